"""`hetlora bench --static`: what it reads from a library, occupancy against NVIDIA's own calculator, and what it says where something is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hetlora_kernels.benchmarks import kit, model, static

ROOT = Path(__file__).resolve().parents[2]
CALCULATOR = Path("/usr/local/cuda/include/cuda_occupancy.h")
MANGLED = "_ZN7hetlora19{}_kernelI{}Lb0EEEvNS_8LoraCallE"
# In the words of cuobjdump 13.1, shortened.
HEAD = "\nFatbin elf code:\n================\narch = sm_87\ncode version = [1,8]\n\n"
RESOURCES = "Resource usage:\n Common:\n  GLOBAL:0\n Function {}:\n  REG:165 STACK:8 SHARED:32768 LOCAL:16 CONSTANT[2]:832 TEXTURE:0\n"
ELF = """.section
   18    7   2f90    1a4  0  4  CUDA_INFO  0  3  0 .nv.info
.nv.info
\t<0x1>
\tAttribute:\tEIATTR_REGCOUNT
\tFormat:\tEIFMT_SVAL
\tValue:\tfunction: x(0x1)\tregister count: 165
.nv.info.{}
\t<0x1>
\tAttribute:\tEIATTR_SW_WAR
\tFormat:\tEIFMT_SVAL
\tValue:\t0x9 0x9 0x9
\t<0x2>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x80 0x1 0x1
.nv.constant2
"""
SASS = """\tcode for sm_87
\t\tFunction : {}
\t.headerflags\t@"EF_CUDA_SM87"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                      /* 0x00000a0000017a02 */
                                                                               /* 0x000fc40000000f00 */
        /*0010*/              @!P0 LOP3.LUT R2, R3, 0x7, RZ, 0xc0, !PT ;       /* 0x0000000703028812 */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;       /* 0x0000000c0804723c */
        /*0030*/              @P1 IADD3 R2, R3, 0x7, RZ ;                      /* 0x0000000703021810 */
        /*0040*/                   BRA 0x40;                                   /* 0xfffffff000007947 */
        /*0050*/                   NOP;                                        /* 0x0000000000007918 */
\t\t..........
"""
NAME = MANGLED.format("some_product", "13__nv_bfloat16")


def ptxas() -> str | None:
    beside = Path(static.cuobjdump() or "").with_name("ptxas")
    return shutil.which("ptxas") or (str(beside) if beside.is_file() else None)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A cuobjdump that knows one kernel, and a library beside it."""
    (tmp_path / "library.so").touch()
    for option, text in (("res-usage", HEAD + RESOURCES), ("elf", HEAD + ELF), ("sass", HEAD + SASS), ("lelf", "ELF file    1: a.1.sm_87.cubin\n")):
        (tmp_path / f"-{option}").write_text(text.replace("{}", NAME))
    script = tmp_path / "cuobjdump"
    script.write_text(f'#!/bin/sh\nfor word; do [ -f "{tmp_path}/$word" ] && cat "{tmp_path}/$word" && exit 0; done; echo "no such option" >&2; exit 3\n')
    script.chmod(0o755)
    monkeypatch.setattr(static, "cuobjdump", lambda: str(script))
    return tmp_path


def test_a_kernel_has_what_the_tool_says_of_it(tool, capsys):
    assert kit.main(["--static", "--arch", "87", "--library", str(tool / "library.so"), "--json", str(tool / "a.json")]) == 0
    out = capsys.readouterr().out
    data = json.loads((tool / "a.json").read_text())
    (own,) = data["kernels"]
    assert (own["name"], own["arch"], own["threads"], own["registers"], own["shared"], own["local"]) == (NAME, 87, 128, 165, 32768, 24)
    assert (own["instructions"], own["tensor"], own["integer"]) == (5, 1, 2) and own["by_code"]["HMMA"] == 1, "a NOP only fills up"
    assert (own["blocks"], own["bound"], own["occupancy"]) == (3, "registers", 0.25)
    if shutil.which("c++filt"):
        assert own["shown"] == "some_product<bfloat16, false>"
    assert "1 kernels, 1 of them with a stack or spills" in out and re.search(r"128 +165 +32768 +24 +3 +25 % +registers +5 +1 +2\n", out)
    assert (data["suite"], data["arch"], data["refused"], data["measurement"]) == ("static", 87, [], False)
    assert {row["kernel"] for row in data["modelled"]} >= {"shrink", "cross_entropy_, logits again from L2"}
    assert "\nmodelled: arithmetic" in out and "\nmodelled microseconds" in out and all(gpu.name in out for gpu in model.GPUS)
    assert kit.main(["--static", "--arch", "87", "--library", str(tool / "library.so"), "--only", "product"]) == 0
    assert "some_product" in capsys.readouterr().out


def test_what_cannot_be_read_is_said_and_the_model_is_shown_all_the_same(tool, tmp_path, monkeypatch, capsys):
    own = ["--static", "--library", str(tool / "library.so"), "--only", "gram"]
    assert kit.main([*own, "--arch", "90", "--json", str(tmp_path / "a.json")]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"NOT READ  {tool / 'library.so'} has sm_87, not sm_90; HETLORA_CUDA=1 HETLORA_CUDA_ARCHS=9.0 pip install")
    assert said.err.count("\n") == 1 and "grouped_gram: T=8192" in said.out and "shrink" not in said.out
    assert json.loads((tmp_path / "a.json").read_text())["refused"] == [said.err.removeprefix("NOT READ  ").strip()]
    (tool / "-sass").unlink()
    assert kit.main([*own, "--arch", "87"]) == 1
    assert "-sass" in (err := capsys.readouterr().err) and err.endswith("no such option\n") and err.startswith("NOT READ  cuobjdump")
    monkeypatch.setattr(static, "cuobjdump", lambda: None)
    assert kit.main([*own, "--arch", "87"]) == 1
    assert capsys.readouterr().err.startswith("NOT READ  no cuobjdump on PATH")
    monkeypatch.setattr(static._native, "FOLDER", tmp_path)
    monkeypatch.setattr(static._native, "build_info", lambda: {"cuda": {"built": False, "reason": "turned off"}})
    assert kit.main(["--static", "--arch", "110"]) == 1
    assert f"no CUDA library {tmp_path / '_C_cuda.so'} (turned off); HETLORA_CUDA=1 HETLORA_CUDA_ARCHS=11.0" in capsys.readouterr().err


def answer(tool: Path, capsys, *given: str, arch: str = "87") -> tuple[int, str, str]:
    """(exit status, standard output, standard error)."""
    status = kit.main(["--static", "--library", str(tool / "library.so"), "--arch", arch, *given])
    return status, *capsys.readouterr()


def test_a_bare_cubin_is_of_the_architecture_that_is_asked_for(tool, capsys):
    """The tool prints no `arch =` for it."""
    for option in ("res-usage", "elf", "sass"):
        file = tool / f"-{option}"
        file.write_text(file.read_text().removeprefix(HEAD))
    status, out, err = answer(tool, capsys)
    assert (status, err) == (0, "") and re.search(r"128 +165 +32768 +24 +3 +25 % +registers +5 +1 +2\n", out)
    with pytest.raises(ValueError, match=f"cuobjdump tells the instructions of {NAME}, sm_87, and not its registers"):
        static.read(tool / "library.so")  # not said which


@pytest.mark.parametrize(
    ("option", "text", "why"),
    [
        ("sass", HEAD + SASS + SASS.replace("{}", "other"), "cuobjdump tells the instructions of other, sm_87, and not its registers"),
        ("elf", HEAD + ELF.replace("{}", "other"), "cuobjdump tells the threads of other, sm_87, and not its registers"),
        ("sass", HEAD, f"cuobjdump tells no instructions of {NAME}, sm_87"),
        ("res-usage", HEAD + 2 * RESOURCES, f"has {NAME} twice for sm_87, and their instructions cannot be told apart; give a file that has one of them"),
        ("lelf", "a.1.sm_87.cubin\na.2.sm_87a.cubin\n", "has sm_87 and sm_87a, which cuobjdump reads as one; give --library a file that has one of them"),
    ],
)
def test_what_does_not_fit_together_is_not_read(option, text, why, tool, capsys):
    (tool / f"-{option}").write_text(text.replace("{}", NAME))
    status, out, err = answer(tool, capsys)
    assert status == 1 and re.fullmatch(rf"NOT READ  {re.escape(str(tool))}/library.so:? {re.escape(why)}\n", err)
    assert "library" not in out and "\nmodelled microseconds" in out


def test_a_library_without_any_kernel_is_not_read(tool, capsys):
    for option in ("res-usage", "elf", "sass"):
        (tool / f"-{option}").write_text("")
    assert answer(tool, capsys)[::2] == (1, f"NOT READ  {tool}/library.so: cuobjdump tells no instructions of any kernel, sm_87\n")


def test_code_for_one_architecture_alone_has_its_name(tool, capsys):
    """cuobjdump -arch sm_90 reads sm_90a too."""
    for option in ("res-usage", "elf", "sass", "lelf"):
        file = tool / f"-{option}"
        file.write_text(file.read_text().replace("sm_87", "sm_90a"))
    status, out, err = answer(tool, capsys, arch="90")
    assert (status, err) == (0, "") and f"library   {tool}/library.so, sm_90a; 1 kernels" in out


PTX = """.version 8.4
.target sm_90a
.address_size 64
.visible .entry shrink_kernel(.param .u64 out) .maxntid 96, 1, 1
{ .reg .b64 %a; .reg .b32 %i; ld.param.u64 %a, [out]; cvta.to.global.u64 %a, %a; mov.u32 %i, %tid.x; st.global.u32 [%a], %i; ret; }
"""


@pytest.mark.skipif(not (static.cuobjdump() and ptxas()), reason="needs cuobjdump and ptxas, of the CUDA toolkit or of Triton")
def test_the_tool_itself_reads_a_cubin(tmp_path, capsys):
    (tmp_path / "a.ptx").write_text(PTX)
    subprocess.run([ptxas(), "-arch=sm_90a", "a.ptx", "-o", "library.so"], cwd=tmp_path, check=True)
    status, out, err = answer(tmp_path, capsys, arch="90")
    assert (status, err) == (0, "") and "library.so, sm_90a; 1 kernels, 0 of them" in out and re.search(r"shrink\w* +96 +\d+ +0 +0 +", out)


def test_names_of_nothing_do_not_hide_why_nothing_was_read(tool, capsys):
    status, _, err = answer(tool, capsys, "--only", "frob", arch="90")
    assert status == 1 and err.startswith("NOT READ") and "has sm_87, not sm_90" in err
    status, out, err = answer(tool, capsys, "--only", "gram")
    assert (status, err) == (0, "") and "sm_87; 0 of 1 kernels" in out, "the model has it"


@pytest.mark.timeout(20)
def test_a_tool_that_says_much_beside_its_answer_is_not_waited_for(tool, capsys):
    script = tool / "cuobjdump"
    script.write_text(script.read_text().replace("#!/bin/sh\n", "#!/bin/sh\nhead -c 300000 /dev/zero | tr '\\0' x >&2\n"))
    assert answer(tool, capsys)[::2] == (0, "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "the following arguments are required: --arch"),
        (["--arch", "75"], "argument --arch: invalid choice: "),
        (["--arch", "87", "--quick"], "unrecognized arguments: --quick"),
        (["--arch", "87", "--json", "no/folder/a.json"], "--json no/folder/a.json: expected a file in a folder that exists"),
        (["--arch", "87", "--only", "frob"], "--only frob: no kernel has one of these in its name"),
    ],
)
def test_bad_input_is_one_line(given, said, tool, capsys):
    assert kit.main(["--static", "--library", str(tool / "library.so"), *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"hetlora bench: error: {said}") and err.count("\n") == 1


def test_the_threads_of_kernels_that_do_not_state_them_are_those_of_their_launches():
    sources = {path.name: path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu*")}
    text = "".join(sources.values())
    silent = set(re.findall(r"__global__ void (?!__launch)(\w+)\(", text))
    assert silent == set(static.THREADS), "others have __launch_bounds__"
    values = {"WARP": 32, "UPLOAD_THREADS": int(re.search(r"UPLOAD_THREADS = (\d+)", text)[1])}
    for kernel in silent:
        launches = set(re.findall(rf"HETLORA_LAUNCH\(\({kernel}<\w+>\), [^;]*?, dim3\((\w+)\), (?:call->)?stream", text))
        assert {values[name] for name in launches} == {static.THREADS[kernel]}, kernel


@pytest.mark.skipif(not CALCULATOR.is_file() or not shutil.which("g++"), reason=f"needs g++ and {CALCULATOR} of the CUDA toolkit")
def test_occupancy_is_that_of_the_toolkits_calculator(tmp_path):
    (tmp_path / "a.cpp").write_text(
        """#include <cstdio>
#include <cstddef>
#define __CUDA_OCC_FORCE_STANDALONE
struct cudaFuncAttributes; struct cudaDeviceProp;
"""
        f'#include "{CALCULATOR}"\n'
        """int main() {
    int arch, threads_of, shared_of, threads, registers, shared;
    while (std::scanf("%d %d %d %d %d %d", &arch, &threads_of, &shared_of, &threads, &registers, &shared) == 6) {
        cudaOccDeviceProp p;
        p.computeMajor = arch / 10; p.computeMinor = arch % 10;
        p.maxThreadsPerBlock = 1024; p.maxThreadsPerMultiprocessor = threads_of;
        p.regsPerBlock = p.regsPerMultiprocessor = 65536; p.warpSize = 32;
        p.sharedMemPerBlock = 49152; p.sharedMemPerMultiprocessor = shared_of; p.sharedMemPerBlockOptin = shared_of - 1024;
        p.reservedSharedMemPerBlock = 1024; p.numSms = 1;
        cudaOccFuncAttributes f;
        f.maxThreadsPerBlock = threads; f.numRegs = registers; f.sharedSizeBytes = shared;
        cudaOccDeviceState state;
        state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        cudaOccResult r;
        int error = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &f, &state, threads, 0);
        std::printf("%d\\n", error ? -error : r.activeBlocksPerMultiprocessor);
    }
}
"""
    )
    subprocess.run(["g++", "-O1", "-w", "a.cpp", "-o", "a"], cwd=tmp_path, check=True)
    kernels = [
        static.Kernel("", arch, registers, shared, threads=threads)
        for arch in static.LIMITS
        for threads in (32, 64, 96, 128, 160, 256, 384, 512, 1024)
        for registers in (16, 32, 33, 40, 41, 64, 72, 80, 100, 128, 165, 200, 255)
        for shared in (0, 1, 832, 1024, 8192, 20000, 32768, 49152)
        if registers * threads <= 65536
    ]
    given = [(own.arch, static.LIMITS[own.arch].threads, static.LIMITS[own.arch].shared, own.threads, own.registers, own.shared) for own in kernels]
    lines = "\n".join(" ".join(map(str, one)) for one in given)
    done = subprocess.run([tmp_path / "a"], input=lines, capture_output=True, text=True, check=True)
    theirs = list(map(int, done.stdout.split()))
    assert len(theirs) == len(kernels) > 5000
    wrong = [(own, blocks) for own, blocks in zip(kernels, theirs, strict=True) if static.occupancy(own)[0] != blocks]
    assert not wrong, f"{len(wrong)} of {len(kernels)}, the first {wrong[0]}"


def test_occupancy_of_what_is_not_known_is_not_said():
    assert static.occupancy(static.Kernel("", 87, 32)) is None and static.occupancy(static.Kernel("", 70, 32, threads=32)) is None

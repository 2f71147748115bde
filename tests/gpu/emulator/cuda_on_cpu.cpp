// The engine of cuda_on_cpu.h: fibers, schedules, barriers.
#include "cuda_on_cpu.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#if defined(__x86_64__)
#define FIBER_ASM 1
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Launches since the library was loaded, and `more` from here on.
extern "C" __attribute__((visibility("default"))) int emulator_launches(int more) {
    static int count = 0;
    return count += more;
}

namespace emulator {
namespace {

constexpr size_t STACK = 256 << 10;
constexpr int COPY_BYTES = 16;
enum class State { ready, at_barrier, at_collective, done };

struct Copy {
    unsigned char* to;
    const void* from;
    int bytes;
};

struct Thread {
    Place place;
    State state = State::ready;
    int line = 0;           // of the barrier it waits at
    unsigned mask = 0;      // of the collective it waits at
    Collective kind = Collective::sync;
    uint64_t value = 0;     // what it offers to the other lanes
    const void* address = nullptr;
    std::vector<std::vector<Copy>> copies{1};  // groups on their way, the last one open
    char* stack = nullptr;
    void* stack_pointer = nullptr;
#ifndef FIBER_ASM
    ucontext_t context;
#endif
};

std::vector<Thread> threads;
std::vector<char*> stacks;
int current = -1;
const std::function<void()>* body = nullptr;
std::string error;
void* main_pointer = nullptr;
#ifndef FIBER_ASM
ucontext_t main_context;
#endif
#if defined(__SANITIZE_ADDRESS__)
const void* main_stack = nullptr;
size_t main_stack_size = 0;
#endif

#ifdef FIBER_ASM
// A switch is a call: the callee-saved registers and the stack pointer are all that has to be kept.
extern "C" void emulator_switch(void** save, void* resume);
asm(R"(
.text
.type emulator_switch,@function
emulator_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp,(%rdi)
    mov %rsi,%rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
#endif

void leave(bool for_good) {
    Thread& me = threads[current];
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, main_stack, main_stack_size);
#else
    (void)for_good;
#endif
#ifdef FIBER_ASM
    emulator_switch(&me.stack_pointer, main_pointer);
#else
    swapcontext(&me.context, &main_context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_size);
#endif
    (*body)();
    threads[current].state = State::done;
    leave(true);
    abort();
}

void resume(int index) {
    current = index;
    Thread& thread = threads[index];
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, thread.stack, STACK);
#endif
#ifdef FIBER_ASM
    emulator_switch(&main_pointer, thread.stack_pointer);
#else
    swapcontext(&main_context, &thread.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void prepare(Thread& thread) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(thread.stack, STACK);  // an abandoned block leaves its frames poisoned
#endif
#ifdef FIBER_ASM
    auto** top = reinterpret_cast<void**>(thread.stack + STACK - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&enter);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    thread.stack_pointer = top;
#else
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
#endif
}

// Lets the lanes of a warp whose collective is complete go on; true when there were some.
bool release_collective(int first, int last) {
    for (int i = first; i < last; ++i) {
        if (threads[i].state != State::at_collective) continue;
        const unsigned mask = threads[i].mask;
        bool complete = true;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) {
                const Thread* other = first + lane < last ? &threads[first + lane] : nullptr;
                complete = complete && other && other->state == State::at_collective && other->mask == mask && other->kind == threads[i].kind;
            }
        if (!complete) continue;
        for (int lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1) threads[first + lane].state = State::ready;
        return true;
    }
    return false;
}

bool resume_ready(const std::vector<int>& order) {
    bool any = false;
    for (int i : order)
        if (threads[i].state == State::ready) {
            resume(i);
            any = true;
        }
    return any;
}

// True when the block is done or cannot go on.
bool release_barrier(bool progress) {
    int done = 0, waiting = 0, line = 0;
    bool same = true;
    for (const Thread& thread : threads) {
        done += thread.state == State::done;
        if (thread.state != State::at_barrier) continue;
        same = same && (waiting == 0 || thread.line == line);
        line = thread.line;
        ++waiting;
    }
    const int count = static_cast<int>(threads.size());
    if (done == count) return true;
    if (waiting && waiting + done == count && same) {
        for (Thread& thread : threads)
            if (thread.state == State::at_barrier) thread.state = State::ready;
        return false;
    }
    if (progress) return false;
    char text[200];
    const uint3 block = threads[0].place.block_index;
    snprintf(text, sizeof text, "threads diverged at a barrier or collective in block (%u, %u, %u): %d done, %d at __syncthreads, %d at a warp collective",
             block.x, block.y, block.z, done, waiting, count - done - waiting);
    error = text;
    return true;
}

void run_block(const std::string& schedule, std::mt19937& random) {
    const int count = static_cast<int>(threads.size()), warps = (count + 31) / 32;
    std::vector<int> order(count), warp_order(warps);
    for (int i = 0; i < count; ++i) order[i] = schedule == "rev" ? count - 1 - i : i;
    for (int w = 0; w < warps; ++w) warp_order[w] = w;
    for (bool progress = true; error.empty();) {
        if (schedule == "rand") std::shuffle(order.begin(), order.end(), random);
        if (schedule == "warp") std::shuffle(warp_order.begin(), warp_order.end(), random);
        progress = schedule != "warp" && resume_ready(order);
        for (int w : warp_order) {
            const int first = w * 32, last = std::min(count, first + 32);
            if (schedule == "warp") {
                const std::vector<int> lanes(order.begin() + first, order.begin() + last);
                do progress = resume_ready(lanes) || progress;
                while (release_collective(first, last));
            } else {
                while (release_collective(first, last)) progress = true;
            }
        }
        if (release_barrier(progress)) return;
    }
}

}  // namespace

const Place& here() { return threads[current].place; }

uint64_t& slot(int lane) { return threads[current / 32 * 32 + lane].value; }

const void*& offer(int lane) { return threads[current / 32 * 32 + lane].address; }

void start_copy(void* to, const void* from, int bytes) {
    memset(to, 0xff, COPY_BYTES);
    threads[current].copies.back().push_back({static_cast<unsigned char*>(to), from, bytes});
}

void close_copies() { threads[current].copies.emplace_back(); }

void await_copies(int pending) {
    auto& groups = threads[current].copies;
    while (static_cast<int>(groups.size()) > pending + 1) {
        for (const Copy& copy : groups.front()) {
            memcpy(copy.to, copy.from, copy.bytes);
            memset(copy.to + copy.bytes, 0, COPY_BYTES - copy.bytes);
        }
        groups.erase(groups.begin());
    }
}

void block_barrier(int line) {
    threads[current].state = State::at_barrier;
    threads[current].line = line;
    leave(false);
}

void meet(unsigned mask, Collective kind) {
    Thread& me = threads[current];
    me.state = State::at_collective;
    me.mask = mask;
    me.kind = kind;
    leave(false);
}

void run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
    emulator_launches(1);
    const char* chosen = getenv("HETLORA_SCHEDULE");
    const std::string schedule = chosen ? chosen : "fwd";
    if (schedule == "none") return;
    const int count = static_cast<int>(block.x * block.y * block.z);
    while (static_cast<int>(stacks.size()) < count) stacks.push_back(static_cast<char*>(aligned_alloc(64, STACK)));
    std::mt19937 random(1);
    body = &kernel;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x && error.empty(); ++x) {
                threads.assign(count, {});
                for (int i = 0; i < count; ++i) {
                    const unsigned u = static_cast<unsigned>(i);
                    threads[i].place = {grid, block, {x, y, z}, {u % block.x, u / block.x % block.y, u / (block.x * block.y)}, i % 32};
                    threads[i].stack = stacks[i];
                    prepare(threads[i]);
                }
                run_block(schedule, random);
            }
    body = nullptr;
}

}  // namespace emulator

// The runtime's error functions, so that launchers and bindings link without the CUDA runtime.
static std::string last_error;

extern "C" cudaError_t cudaGetLastError() {
    last_error.swap(emulator::error);
    emulator::error.clear();
    return last_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

extern "C" const char* cudaGetErrorString(cudaError_t) { return last_error.c_str(); }

"""Clients that are processes of their own: what `hetlora.flower` and `hetlora.nvflare`, which carry the messages, have in common."""

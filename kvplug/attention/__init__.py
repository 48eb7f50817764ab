"""The vLLM attention backend: the only part of kvplug that vLLM's model runner talks to."""

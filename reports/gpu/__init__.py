"""What `gpu.check` runs on a machine with an NVIDIA GPU: one file per stage, and what they share.

A stage is a process of its own with a time budget. It writes its result (`stage`) and its rows (`device`) as it goes,
so that nothing is lost when it is stopped or a kernel breaks the GPU's context.
"""

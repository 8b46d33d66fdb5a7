"""A stand-in for CUDA streams and NCCL: threads as ranks, each with a device that keeps the rules without a GPU.

Tensors are in host memory, but what is done with them is queued, and done when a device would come to it. Where NCCL
may or may not do something (a small message may leave before it is received), the stand-in does what is harder to live
with. ``device`` has streams and hardware queues, ``nccl`` communicators, ``ranks`` threads and their process group.
``bench.gpu_check.rules`` holds each rule, as a function that runs on the stand-in and on a GPU.
"""

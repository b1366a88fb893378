"""Host time of operators: as compiled graphs call them, and of the public functions, for the "host" cases."""

import os
import sys
import time

import torch

import vitrail
from vitrail.tools._common.kernel_cases import OPERATORS

device = torch.device(sys.argv[1])
suite = "host" if device.type == "cuda" else "cpu"
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
began = time.perf_counter()
print(torch.__version__, vitrail.__file__, os.sched_getaffinity(0), os.cpu_count(), flush=True)
registered = {q.split("::")[1].split(".")[0] for q in torch._C._dispatch_get_all_op_names() if "vitrail::" in q}


def enqueue(call):
    for _ in range(6):
        call()
    sync()
    times = []
    stop = time.perf_counter() + (0.15 if device.type == "cuda" else 0)
    while time.perf_counter() < stop or len(times) < 3:
        start = time.perf_counter()
        for _ in range(12):
            call()
        times.append((time.perf_counter() - start) / 12)
        sync()
    times.sort()
    return f"p5 {times[len(times) // 20] * 1e6:6.1f} p50 {times[len(times) // 2] * 1e6:6.1f} us"


def on_gpu(call):
    if device.type != "cuda":
        return ""
    for _ in range(3):
        call()
    sync()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            call()
    graph.replay()
    sync()
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(20):
        graph.replay()
    last.record()
    sync()
    return f"gpu {first.elapsed_time(last) / 400 * 1e3:7.2f} us"


def watched(name, captured):
    replayed = getattr(torch.ops.vitrail, name).default.replayed
    function = replayed.function

    def save(*arguments):
        captured.setdefault(name, [a.detach() if torch.is_tensor(a) else a for a in arguments])
        return function(*arguments)

    replayed.function = save
    return replayed, function


def measure(label, implementation, inputs, only_graph=False):
    captured = {}
    undo = []
    for name in registered:
        try:
            undo.append(watched(name, captured))
        except AttributeError:
            pass
    given = implementation.prepare(*inputs)
    out = implementation.run(*given)
    leaves = [t for t in given if torch.is_tensor(t) and t.requires_grad]
    torch.autograd.grad(out, leaves, torch.randn_like(out), allow_unused=True)
    for replayed, function in undo:
        replayed.function = function
    for name in sorted(captured):
        if name == "sort_windows":
            continue
        call, arguments = getattr(torch.ops.vitrail, name).default, captured[name]
        with torch.no_grad():
            found = enqueue(lambda: call(*arguments))
            gpu = on_gpu(lambda: call(*arguments)) if "linear" in name else ""
        plans = any(not isinstance(p, bool) for p in call.replayed._plans.values())
        print(f"  {name:38s} graph  {found} {gpu} replayed {plans}", flush=True)
    with torch.no_grad():
        print(f"  {label:38s} public {enqueue(lambda: implementation.run(*given))}", flush=True)
    if leaves:
        print(f"  {label:38s} public, with gradients {enqueue(lambda: implementation.run(*given))}", flush=True)


for operator in sys.argv[2].split(","):
    for case in OPERATORS[operator](suite):
        print(operator, case.name, f"{time.perf_counter() - began:.0f} s")
        inputs = [one.make(device, dtype, seed) for seed, one in enumerate(case.inputs)]
        for label, implementation in case.implementations.items():
            if label == "vitrail" or (label == "vitrail packed" and "linear" in operator):
                measure(label, implementation, inputs)
if "linear_attention" in sys.argv[2] and device.type == "cuda":
    from vitrail.kernels.linear_attention import linear_attention_packed

    for size, heads in ((14, 12), (7, 24)):
        qkv = torch.randn(64, size, size, 3, heads, 32, device=device, dtype=dtype)
        t, g = torch.randn(heads, device=device), torch.randn(64, size, size, heads, 32, device=device, dtype=dtype)
        with torch.no_grad():
            forward = on_gpu(lambda: torch.ops.vitrail.linear_attention_packed.default(qkv, t, 100.0))
            backward = on_gpu(lambda: torch.ops.vitrail.linear_attention_packed_backward.default(g, qkv, t, 100.0))
        print(f"linear_attention_packed B64 {size}x{size} h{heads}: forward {forward}, backward {backward}", flush=True)

"""Host time of operators as compiled graphs call them, for the arguments that the "host" cases lead to."""

import sys, time
import torch
import vitrail
from vitrail.tools._common.kernel_cases import OPERATORS

device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
suite = "host" if device.type == "cuda" else "cpu"
only = sys.argv[2].split(",") if len(sys.argv) > 2 else None
captured = {}
print(torch.__version__, vitrail.__file__, flush=True)


def watch(name):
    replayed = getattr(torch.ops.vitrail, name).default.replayed
    function = replayed.function

    def save(*arguments):
        captured.setdefault(name, [a.detach() if torch.is_tensor(a) else a for a in arguments])
        return function(*arguments)

    replayed.function = save
    return replayed, function


undo = []
for operator in OPERATORS:
    if only and operator not in only:
        continue
    for case in OPERATORS[operator](suite):
        registered = [
            q.split("::")[1].split(".")[0] for q in torch._C._dispatch_get_all_op_names() if q.startswith("vitrail::")
        ]
        for name in registered:
            if name not in dict(undo):
                try:
                    replayed, function = watch(name)
                    undo.append((name, (replayed, function)))
                except AttributeError:
                    undo.append((name, None))
        for label, implementation in case.implementations.items():
            if not label.startswith("vitrail") or "compiled" in label:
                continue
            inputs = [
                one.make(device, torch.bfloat16 if device.type == "cuda" else torch.float32, seed)
                for seed, one in enumerate(case.inputs)
            ]
            given = implementation.prepare(*inputs)
            out = implementation.run(*given)
            leaves = [t for t in given if torch.is_tensor(t) and t.requires_grad]
            torch.autograd.grad(out, leaves, torch.randn_like(out), allow_unused=True)
for _, found in undo:
    if found:
        found[0].function = found[1]
sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
for name in sorted(captured):
    call, arguments = getattr(torch.ops.vitrail, name).default, captured[name]
    with torch.no_grad():
        for _ in range(5):
            call(*arguments)
        sync()
        times = []
        stop = time.perf_counter() + 0.25
        while time.perf_counter() < stop or len(times) < 5:
            start = time.perf_counter()
            for _ in range(15):
                call(*arguments)
            times.append((time.perf_counter() - start) / 15)
            sync()
    times.sort()
    plans = [p for p in call.replayed._plans.values() if not isinstance(p, bool)]
    print(
        f"{name:42s} p20 {times[len(times) // 5] * 1e6:7.1f} us  p50 {times[len(times) // 2] * 1e6:7.1f}  replayed {bool(plans)}",
        flush=True,
    )
    if plans and hasattr(plans[0], "code") and "-v" in sys.argv:
        print(plans[-1].code)

"""The parts of `local-rerank bench`.

- `workloads`: the requests to rank
- `shapes`: checkpoints of random weights in the shapes of the official models
- `flops`: the useful operations of a request, and the hardware's ceiling (GEMM)
- `targets`: what is measured, behind one method (`benchmarks/peers.py` adds other software)
- `measure`: runs targets on workloads in alternation
- `report`: tables
- `cpu_speed`, `kept_speeds`: the speed of this CPU for `plan`, measured in seconds and kept
"""

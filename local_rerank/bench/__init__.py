"""What `local-rerank bench` is made of; each file answers one question.

- `workloads.py`: which texts are ranked
- `shapes.py`: checkpoints of random weights in the shapes of the official models
- `flops.py`: how much arithmetic a request needs, and how fast this machine multiplies (the ceiling)
- `peer.py`: the same requests through other people's code, in a process of its own
- `systems.py`: ours and the peers behind one call
- `measure.py`: all systems over all workloads, in turn, and what they are compared by
- `report.py`: the tables, the JSON and the plot
"""

"""How much more do two replicas answer than one? `local-rerank serve --ray`, one thread each, closed loop.

    python benchmarks/ray_replicas.py --documents 32 --words 300 --seconds 25

The client runs on the same cores. The last line fits docs/log.md.
"""

from __future__ import annotations

import argparse

from serving_load import body, closed_loop, num_computed_tokens, server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--words", type=int, default=300, help="of a document; each is a token of the built-in model")
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--replicas", type=int, nargs="+", default=[0, 1, 2], help="0: one process, without Ray")
    options = parser.parse_args()
    bodies = [body(number, options.documents, options.words) for number in range(64)]
    rates = {}
    for replicas in options.replicas:
        how = ["--ray", "--replicas", str(replicas)] if replicas else []
        with server("--threads", "1", *how) as address:
            tokens = num_computed_tokens(address, bodies[0])
            clients = 3 * max(1, replicas)
            closed_loop(address, bodies, clients, 3.0)  # warm
            rates[replicas] = closed_loop(address, bodies, clients, options.seconds)
        pairs = rates[replicas] * options.documents
        print(f"{replicas or 'no'} replicas: {pairs:.1f} pairs/s, {rates[replicas] * tokens:.0f} tokens/s", flush=True)
    if 1 in rates and 2 in rates:
        print(
            f"{options.documents} documents of {options.words} tokens, one thread each, client on the same cores: "
            f"two replicas answer {rates[2] / rates[1]:.2f}x of what one does "
            f"({rates[2] * options.documents:.1f} against {rates[1] * options.documents:.1f} pairs/s)"
        )


if __name__ == "__main__":
    main()

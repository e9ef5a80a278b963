"""A stratified sample of prompts: as many of each cluster, the same ones for every variant and at every start.

A prompt's place in the draw depends on the seed and its own text alone. So the order of the rows does not matter, nor
what other clusters hold, and a larger sample holds the smaller one.
"""

import argparse
from collections.abc import Mapping
from typing import NamedTuple

from psysafe.cli import whole_number
from psysafe.journal import key_of
from psysafe.program import UserError


class Sample(NamedTuple):
    """per_cluster: how many prompts of each cluster; one with fewer is taken whole."""

    per_cluster: int
    seed: int

    def draw(self, cluster_of: Mapping[str, str]) -> tuple[list[str], str]:
        """(the prompts that were drawn, in their order; a note). cluster_of: prompt -> cluster, "" for none."""
        if not any(cluster_of.values()):
            raise UserError("--sample-per-cluster: no row names a cluster; expected rows with `risk cluster`")
        by_cluster: dict[str, list[str]] = {}
        for prompt, cluster in cluster_of.items():
            by_cluster.setdefault(cluster, []).append(prompt)
        drawn = {
            prompt
            for prompts in by_cluster.values()
            for prompt in sorted(prompts, key=lambda prompt: key_of("sample", self.seed, prompt))[: self.per_cluster]
        }
        fewer = [f"{cluster or 'no cluster'} ({len(prompts):,})"
                 for cluster, prompts in by_cluster.items() if len(prompts) < self.per_cluster]  # fmt: skip
        note = f"sample of {self.per_cluster:,} prompts per cluster, seed {self.seed}: {len(drawn):,} of "
        note += f"{len(cluster_of):,} prompts, {len(by_cluster):,} clusters"
        whole = f"; taken whole, for they have fewer: {', '.join(fewer)}" if fewer else ""
        return [prompt for prompt in cluster_of if prompt in drawn], note + whole


def add_argument(parser: argparse.ArgumentParser) -> None:
    help_text = "only N prompts of each cluster, drawn by --seed; the same for every variant"
    parser.add_argument("--sample-per-cluster", type=whole_number, metavar="N", help=help_text)


def from_arguments(args: argparse.Namespace) -> Sample | None:
    return Sample(args.sample_per_cluster, args.seed) if args.sample_per_cluster else None

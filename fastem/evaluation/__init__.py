"""Measuring: a protocol in, rows, statistics and a report out. See docs/evaluation.md and `fastem evaluate`."""

from fastem.evaluation.cases import SOURCES, Case, list_cases
from fastem.evaluation.protocol import Method, Protocol, ProtocolError, load_protocol, names, parse_protocol
from fastem.evaluation.report import write_report
from fastem.evaluation.run import Evaluation, NetworkCounter, measure_sets, network_flops, score
from fastem.evaluation.statistics import bootstrap_mean, paired

__all__ = [
    "SOURCES",
    "Case",
    "Evaluation",
    "Method",
    "NetworkCounter",
    "Protocol",
    "ProtocolError",
    "bootstrap_mean",
    "list_cases",
    "load_protocol",
    "measure_sets",
    "names",
    "network_flops",
    "paired",
    "parse_protocol",
    "score",
    "write_report",
]

"""The status as Prometheus metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_SHARD_GAUGES: Final = {
    "progress": "Samples seen of the shard's budget, 0..1.",
    "generation": "Newest generation of the shard.",
    "loss": "Mean training loss of the newest contribution.",
    "accuracy": "Own-validation accuracy of the newest contribution, 0..1.",
}
#: Counters of the status that can fall: they are shown as gauges.
_PEAKS: Final = {"peak_rss_bytes"}


class StatusCollector(Collector):
    """Turns the status into metrics each time it is asked, so that nothing has to be kept in step."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status = status

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not ask for the status."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All metrics, from one status."""
        status = self._status()
        for name, text in {
            "progress": "Progress of the run, 0..1.",
            "coverage": "Fraction of the classes that an assembled model can tell.",
            "complete": "1 when every shard is complete.",
        }.items():
            yield GaugeMetricFamily(f"p2pcollab_{name}", text, value=float(status.get(name) or 0))
        live = sum(peer.get("state") not in ("gone", "left") for peer in status.get("peers", ()))
        yield GaugeMetricFamily("p2pcollab_peers", "Live peers.", value=live)
        work = status.get("work") or {}
        yield GaugeMetricFamily(
            "p2pcollab_training_samples_per_second",
            "Speed of the lease in progress; 0 when idle.",
            value=float(work.get("samples_per_s") or 0),
        )
        for name, value in sorted((status.get("counters") or {}).items()):
            family = GaugeMetricFamily if name in _PEAKS else CounterMetricFamily
            yield family(f"p2pcollab_{name}", f"Status counter {name}.", value=float(value or 0))
        for name, text in _SHARD_GAUGES.items():
            gauge = GaugeMetricFamily(f"p2pcollab_shard_{name}", text, labels=("shard", "label"))
            for shard in status.get("shards", ()):
                if shard.get(name) is not None:
                    gauge.add_metric((shard["shard"], shard["label"]), float(shard[name]))
            yield gauge

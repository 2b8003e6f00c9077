"""Early warnings: one sentence when the mutual loss starts to override the labels, with the settings to change."""

from collections import deque
from collections.abc import Sequence

from rplib.reference.reporting.run_log import LogRow

_RISE, _LEAST_RISE = 1.3, 0.1  # of the supervised loss over its lowest so far: factor, and absolute for both decoders together
_GONE, _THERE = 0.02, 0.2  # share of a class among the pseudo-labels, as a fraction of its share among the labels
_KNOWN = 0.5  # the same fraction; from here on a class counts as known
_RAMPED = 0.05  # fraction of the maximum weight; from here on a class that was never predicted is reported


class Monitor:
    """Watches the rows of metrics.csv; every warning is given once.

    Means over `window` iterations are compared, because single crops vary.

    Args:
        shares: share of each class among the labels of the training cases, background first.
        maximum: maximum consistency weight; 0: nothing to watch.
        iterations: number of iterations of the training.

    Example:
        >>> monitor = Monitor([0.9, 0.1], 1.0, 400)
        >>> def row(t, loss, weight):
        ...     return LogRow(t, 0.0, loss, 0.0, weight, 0.01, 0.1)
        >>> monitor.look([row(t, 0.4, 0.1) for t in range(1, 21)])
        []
        >>> [text] = monitor.look([row(t, 0.9, 0.5) for t in range(21, 61)])
        >>> text.startswith("iteration 30: the supervised loss rose from 0.400 to 0.900 while the weight of the mutual loss grew")
        True
    """

    def __init__(self, shares: Sequence[float], maximum: float, iterations: int) -> None:
        self._shares, self._maximum = list(shares), maximum
        self.window = max(10, iterations // 40)
        self._rows: deque[LogRow] = deque(maxlen=self.window)
        self._seen = 0
        self._lowest, self._weight_there = float("inf"), 0.0
        self._told: set[object] = set()
        self._was_there: set[int] = set()

    def look(self, rows: Sequence[LogRow]) -> list[str]:
        """Add new rows and return the warnings that they cause."""
        if not self._maximum:
            return []
        found = []
        for row in rows:
            self._rows.append(row)
            self._seen += 1
            if self._seen % self.window == 0:
                found += self._at_the_end_of_a_window()
        return found

    def knows_every_class(self) -> bool:
        """Whether, over the last window, both decoders predict every class of the labels at half its share or more."""
        known = [row.pseudo_labels for row in self._rows if row.pseudo_labels]
        if len(self._rows) < self.window or not known:
            return False
        classes = [k for k in range(1, len(self._shares)) if self._shares[k]]
        return all(
            sum(one[n][k] for one in known) / len(known) >= _KNOWN * self._shares[k]
            for k in classes
            for n in range(len(known[0]))
        )

    def _at_the_end_of_a_window(self) -> list[str]:
        rows = list(self._rows)
        loss, weight = (sum(getattr(row, name) for row in rows) / len(rows) for name in ("dice", "consistency_weight"))
        t, warnings = rows[-1].iteration, []
        risen = loss > _RISE * self._lowest and loss > self._lowest + _LEAST_RISE
        if risen and weight > self._weight_there and "rise" not in self._told:
            self._told.add("rise")
            warnings.append(
                f"iteration {t}: the supervised loss rose from {self._lowest:.3f} to {loss:.3f} while the weight of the mutual "
                f"loss grew to {weight:.2g}: pseudo-labels override the labels; lower consistency (now {self._maximum:g}), raise "
                "ramp_every or warmup, or set supervised=dice+cross_entropy schedule=polynomial."
            )
        if loss < self._lowest:
            self._lowest, self._weight_there = loss, weight
        return warnings + self._classes(rows, weight, t)

    def _classes(self, rows: Sequence[LogRow], weight: float, t: int) -> list[str]:
        known = [row.pseudo_labels for row in rows if row.pseudo_labels]
        if not known or not weight:  # nothing is taught yet
            return []
        warnings = []
        for k in range(1, len(self._shares)):
            share, networks = self._shares[k], len(known[0])
            if not share:
                continue
            predicted = [sum(one[n][k] for one in known) / len(known) for n in range(networks)]
            if min(predicted) > _THERE * share:
                self._was_there.add(k)
            awaited = k in self._was_there or weight > _RAMPED * self._maximum
            gone = [n + 1 for n in range(networks) if predicted[n] < _GONE * share]
            if gone and awaited and k not in self._told:
                self._told.add(k)
                which = "neither decoder predicts" if len(gone) == networks else f"decoder {gone[0]} does not predict"
                warnings.append(
                    f"iteration {t}: {which} class {k}, which has {100 * share:.2g} % of the labelled voxels: pseudo-labels "
                    "teach that it is absent; set dropout=0 and norm=instance, lower consistency (now "
                    f"{self._maximum:g}), raise ramp_every or warmup, or set supervised=dice+cross_entropy."
                )
        return warnings

"""Samples, their spread, and how they are shown and kept."""

import csv
import json
import math

from . import peers


def quantile(values, q):
    """The value below which a share q of the values lies (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def spread(values, digits=2):
    """p50 / p90 / p99 / max in words."""
    if not values:
        return "-"
    return " / ".join(f"{quantile(values, q):.{digits}f}" for q in (0.5, 0.9, 0.99)) + f" / {max(values):.{digits}f}"


def between(values, digits=2):
    """Median (smallest – largest) in words: for ratios, whose bad end is not always the large one."""
    return f"{quantile(values, 0.5):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})" if values else "-"


class Record:
    """Every sample of a run: (bench, case, kind, round, metric, value)."""

    FIELDS = ("bench", "case", "kind", "round", "metric", "value")

    def __init__(self, machine):
        self.machine = machine
        self.samples = []
        self.notes = []

    def add(self, bench, case, kind, number, **metrics):
        """Samples of one round. The names of metrics end in their unit: _ms, _us, _gbs, _pages, …"""
        for metric, value in metrics.items():
            if value is not None:
                self.samples.append((bench, case, kind, number, metric, value))

    def attempt(self, bench, case, kind, number, function, *arguments):
        """What the function gives; None when it raised peers.Failed, which is then a sample and a note."""
        try:
            return function(*arguments)
        except peers.Failed as e:
            self.add(bench, case, kind, number, failed=1)
            self.note(f"{bench}, {case}: {kind} {number} failed: {e}")
            return None

    def failures(self, bench, case, kind):
        """How many of this kind failed."""
        return len(self.values(bench, case, kind, "failed"))

    def note(self, text):
        """A remark that belongs to the figures."""
        self.notes.append(text)
        print(f"note: {text}", flush=True)

    def values(self, bench, case, kind, metric):
        """The samples of one metric, in the order they were taken."""
        return [s[5] for s in self.samples if s[:3] == (bench, case, kind) and s[4] == metric]

    def others(self, bench, case):
        """The share of the machine that others used during a case, in words."""
        values = self.values(bench, case, "host", "others_percent")
        return f"{values[0]:.0f}" if values else "-"

    def ratios(self, bench, case, metric, kind, beside):
        """The metric of one kind over that of another, round by round."""
        other = {s[3]: s[5] for s in self.samples if s[:3] == (bench, case, beside) and s[4] == metric}
        return [s[5] / other[s[3]] for s in self.samples
                if s[:3] == (bench, case, kind) and s[4] == metric and other.get(s[3])]

    def save(self, json_path, csv_path):
        """Write everything; either path may be None."""
        if json_path:
            summary = {}
            for bench, case, kind, _, metric, _ in self.samples:
                values = self.values(bench, case, kind, metric)
                summary.setdefault(bench, {}).setdefault(case, {}).setdefault(kind, {})[metric] = {
                    "n": len(values), "p50": quantile(values, 0.5), "p90": quantile(values, 0.9),
                    "p99": quantile(values, 0.99), "min": min(values), "max": max(values)}
            with open(json_path, "w", encoding="utf-8") as f:
                json.dump({"machine": self.machine, "notes": self.notes, "summary": summary,
                           "samples": [dict(zip(self.FIELDS, s)) for s in self.samples]}, f, indent=1)
                f.write("\n")
        if csv_path:
            with open(csv_path, "w", encoding="utf-8", newline="") as f:
                out = csv.writer(f)
                out.writerow(self.FIELDS)
                out.writerows(self.samples)


def table(title, head, rows):
    """Print a Markdown table with aligned columns."""
    rows = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(cells):
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths)) + " |"

    print(f"\n{title}\n\n{line(head)}\n|{'|'.join('-' * (w + 2) for w in widths)}|")
    for row in rows:
        print(line(row))
    print(flush=True)

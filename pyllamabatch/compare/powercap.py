"""Energy of processor packages from Linux's powercap tree (RAPL; Intel and AMD)."""

from __future__ import annotations

from pathlib import Path

TREE = Path("/sys/class/powercap")


class Powercap:
    """Joules of all packages since this was made. The counters wrap around (every few minutes on a
    large machine): read often enough to see it.

    Nothing where there is no such tree, or where it may not be read: since Linux 5.10 root alone
    may, unless the administrator says otherwise.
    """

    def __init__(self, tree: Path = TREE) -> None:
        self._packages = [
            zone
            for zone in sorted(tree.glob("*-rapl:*"))
            if zone.name.count(":") == 1 and (_text(zone / "name") or "").startswith("package")
        ]
        self._last = [self._counter(zone) for zone in self._packages]
        self._joules = 0.0

    def read(self) -> dict[str, float]:
        if not self._packages or None in self._last:
            return {}
        for i, zone in enumerate(self._packages):
            before, now = self._last[i], self._counter(zone)
            if before is None or now is None:
                self._last[i] = None
                return {}
            more = now - before
            if more < 0:
                more += int(_text(zone / "max_energy_range_uj") or 0)
            self._joules += more / 1e6
            self._last[i] = now
        return {"cpu_energy_joules": self._joules}

    @staticmethod
    def _counter(zone: Path) -> int | None:
        text = _text(zone / "energy_uj")
        return int(text) if text and text.isdigit() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None

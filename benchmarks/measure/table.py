"""The report as text: ratios in time and memory, the floor on a GPU, and change against an older file."""

from __future__ import annotations

from .results import OURS, Figure, Results

LEGEND = """\
time        median of a call, in brackets its p20 and p80{clock}
× time      this row's time over ours, taken in turns (median, p20 and p80): above 1 ours is faster
extra mem   peak bytes of a call minus the bytes before it; × mem: this row's over ours"""
HOST = """\
host        time of the host to start a call"""
ROOFLINE = """\
floor       least time for the bytes and operations of the work at this device's measured ceilings,
            and the share of it that was reached"""
CHANGE = """\
change      time now over time then, ours and theirs alike; "=" where the p20 to p80 ranges overlap"""


def render(results: Results, older: Results | None = None) -> str:
    """The whole report."""
    host = any(figure.host_seconds for figure in results.figures)
    roofline = any(figure.floor_seconds and _needs(figure) for figure in results.figures)
    then = {figure.key: figure for figure in older.figures} if older else {}
    lines = [_head(results)]
    if older:
        lines.append(f"against {older.path.name}: {older.device}, torch {older.versions.get('torch')}")
        if older.device != results.device:
            lines.append("ATTENTION: that file is of another device; changes compare the devices too")
    previous = None
    for (work, case), group in results.groups().items():
        if work != previous:
            lines += ["", work, _columns(host, roofline, bool(older))]
            previous = work
        ours = next((figure for figure in group if figure.role == OURS), None)
        lines.append(f"  {case}  ({group[0].dtype})")
        lines += [_line(figure, ours, host, roofline, then, bool(older)) for figure in group]
    lines += ["", *_left_out("REFUSED, the correctness check failed", results.refused)]
    lines += _left_out("not measured", results.skipped)
    clock = "; on a GPU between events on the device" if results.ceilings else ""
    lines.append(LEGEND.format(clock=clock))
    lines += [HOST] * host + [ROOFLINE] * roofline + [CHANGE] * bool(older)
    return "\n".join(lines)


def _head(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    rates = ", ".join(f"{name.replace('_', ' ')} {rate:.3g}" for name, rate in results.ceilings.items())
    return f"{results.path.name}: {results.device}\n{versions}" + (f"\nceilings: {rates}" if rates else "")


def _needs(figure: Figure) -> bool:
    return bool(figure.floor_seconds and figure.floor_seconds > 0)


def _columns(host: bool, roofline: bool, change: bool) -> str:
    line = f"    {'':34} {'time':>8} {'(p20–p80)':>19} {'× time':>8} {'(p20–p80)':>14}"
    line += f" {'extra mem':>10} {'× mem':>6}"
    return (
        line + f" {'host':>8}" * host + f" {'floor':>8} {'share':>6}" * roofline + f" {'change':>7}" * change
    )


def _line(
    figure: Figure, ours: Figure | None, host: bool, roofline: bool, then: dict[tuple, Figure], change: bool
) -> str:
    name = figure.role + (f" ({figure.backend})" if figure.role == OURS and figure.backend else "")
    time, ratio = figure.best, figure.over_ours
    around = f"({seconds(time['p20'])}–{seconds(time['p80'])})"
    line = f"    {name[:34]:34} {seconds(time['p50']):>8} {around:>19}"
    if ratio:
        line += f" {times(ratio['p50']):>8} {'(' + times(ratio['p20']) + '–' + times(ratio['p80']) + ')':>14}"
    else:
        line += f" {'1' if figure.role == OURS else '?':>8} {'':>14}"
    more = figure.peak_bytes / ours.peak_bytes if ours and ours.peak_bytes else None
    more = "?" if more is None else ">999" if more >= 1000 else times(more)
    line += f" {size(figure.peak_bytes):>10} {'1' if figure.role == OURS else more:>6}"
    if host:
        line += f" {seconds(figure.host_seconds['p50']) if figure.host_seconds else '-':>8}"
    if roofline:
        known = _needs(figure)
        floor = seconds(figure.floor_seconds) if known and figure.floor_seconds else "-"
        share = f"{(figure.floor_seconds or 0) / time['p50']:.0%}" if known else "-"
        line += f" {floor:>8} {share:>6}"
    return line + (f" {_change(figure, then.get(figure.key)):>7}" if change else "")


def _change(now: Figure, before: Figure | None) -> str:
    if before is None:
        return "new"
    if now.best["p20"] <= before.best["p80"] and before.best["p20"] <= now.best["p80"]:
        return "="
    return f"{times(now.best['p50'] / before.best['p50'])}×"


def _left_out(title: str, entries: list[dict[str, str]]) -> list[str]:
    if not entries:
        return []
    listed: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        listed.setdefault((entry["work"], entry["reason"]), []).append(f"{entry['case']}: {entry['role']}")
    lines = [f"{title}:"]
    for (work, reason), which in listed.items():
        lines += [f"  {work}: {reason}", *(f"    {item}" for item in which)]
    return [*lines, ""]


def seconds(value: float) -> str:
    """A time in three digits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def size(count: float) -> str:
    """Bytes in three digits."""
    for factor, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << factor:
            return f"{count / (1 << factor):.3g} {unit}"
    return f"{count:.0f} B"


def times(value: float) -> str:
    """A ratio in three digits."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}" if value >= 1 else f"{value:.2f}"

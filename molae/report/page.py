"""A report as one HTML page that needs nothing else: no network, no script, no other file.

The page is made from the report alone, so the same report always gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from molae.convert import Report
from molae.convert.report import PAGE, REPORT
from molae.errors import CheckpointError, DestinationError
from molae.io import write_text_atomic
from molae.report import figures
from molae.report.facts import (
    active_numbers,
    calibrated,
    final_errors,
    foreseen,
    kinds_of,
    mean_square,
    notes,
    source_title,
)
from molae.report.markup import Markup, join, table, tag
from molae.report.style import CSS
from molae.report.units import percent, size_text, time_text, whole

__all__ = ["page_text", "write_page"]

#: What was done to the source, in the page's title.
DONE = {
    "convert": "converted by molae",
    "heal": "healed by molae",
    "materialize": "multiplied out by molae",
}

#: Nothing may be loaded or run; the one style sheet is known by its hash.
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(CSS.encode()).digest()).decode()
    + "'"
)


def write_page(report: Report, path: Path) -> Path:
    """Write the page of a report, whole or not at all.

    Parameters
    ----------
    report : Report
    path : Path
        A file, or a folder in which it is called ``molae-report.html``.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    CheckpointError
        The report was changed by hand, so that no page can be made of it.
    DestinationError
        It cannot be written.
    """
    path = path / PAGE if path.is_dir() else path
    text = page_text(report)
    try:
        write_text_atomic(path, text)
    except OSError as error:
        raise DestinationError(
            f"{path}: the page could not be written ({error}); the report itself is whole, and "
            "`molae report DST --out FILE` makes the page elsewhere"
        ) from error
    return path


def page_text(report: Report) -> str:
    """The page of a report.

    Raises
    ------
    CheckpointError
        An entry of the report is missing, or of another type than molae writes.
    """
    try:
        return _page(report)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{REPORT}: an entry is not what molae writes ({type(error).__name__}: {error}); "
            "was the file changed by hand? Run the command again that wrote it"
        ) from error


def _page(report: Report) -> str:
    title = f"{source_title(report.plan)}, {DONE[report.kind]}"
    sections = [made for made in _sections(report) if made is not None]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    body = tag(
        "body",
        _header(report, sections),
        tag("main", *(made for _, _, made in sections)),
        tag(
            "footer",
            f"Made from {REPORT} by molae {report.versions['molae']}. Errors are relative "
            "Frobenius errors; sizes are decimal, 1 GB is 10⁹ bytes.",
        ),
    )
    return "<!doctype html>\n" + tag("html", head, "\n", body, lang="en") + "\n"


#: Anchor, title and the section itself.
Section = tuple[str, str, Markup]


def _sections(report: Report) -> Iterable[Section | None]:
    f = figures
    yield _section("sizes", "Sizes", "", [f.sizes(report), _size_table(report)])
    yield _section(
        "ranks",
        "Groups and ranks",
        "Experts of a group share one factor of this rank; each keeps a private one.",
        [_types_table(report), f.shares(report), f.sensitivity(report), *f.rank_maps(report)],
    )
    yield _section(
        "errors",
        "Errors",
        "0: nothing is lost. 1: as much as if the matrix were not there.",
        [f.answer_errors(report), f.output_errors(report), f.weight_errors(report),
         _worst_table(report)],
    )  # fmt: skip
    yield _section(
        "healing",
        "Training of the layers",
        "Each layer was trained to answer as the original's does.",
        [f.healing_ends(report), f.healing_curves(report)],
    )
    yield _section(
        "compressed",
        "Compressed experts",
        _compressed_text(report),
        [f.compressed_errors(report), f.compressed_counts(report)],
    )
    yield _section(
        "spectra",
        "Spectra",
        "How fast the singular values of a group's stacked experts fall says how much a shared "
        "factor can leave out.",
        [f.effective_ranks(report), *f.curves(report)],
    )
    load = f.load(report)
    yield _section(
        "time", "Routing and time" if load else "Time", "", [load, f.layer_seconds(report)]
    )
    yield _section(
        "run",
        "The run",
        "",
        [_settings_card(report), _versions_card(report), _workers_card(report),
         _files_card(report)],
        layout="columns",
    )  # fmt: skip


def _section(
    key: str, title: str, lead: str, cards: Iterable[Markup | None], layout: str = "grid"
) -> Section | None:
    """Cards side by side where there is room; None without any."""
    found = [own for own in cards if own is not None]
    if not found:
        return None
    made = tag(
        "section",
        tag("h2", title, id=key),
        tag("p", lead, class_="lead") if lead else None,
        tag("div", *found, class_=layout),
        aria_labelledby=key,
    )
    return key, title, made


# ---------------------------------------------------------------------- headline


def _header(report: Report, sections: Iterable[Section]) -> Markup:
    plan = report.plan
    letters = {letter: plan["letters"][letter] for letter in "LEKDF"}
    facts = [
        plan["family"],
        "{L} layers of {E} experts, {K} a token, width {D}, inner width {F}".format_map(letters),
        str(plan["dtype"]).lower(),
        f"method {plan['method']}, {plan['form']} form",
    ]
    text = report.settings.get("calibration")
    if text:
        tokens = text["sequences"] * text["length"]
        facts.append(f"fitted to {whole(tokens)} tokens of {text['text']}")
    elif report.kind == "convert":
        facts.append("without data")
    found = notes(report)
    return tag(
        "header",
        tag("h1", source_title(plan), ", ", DONE[report.kind]),
        tag("p", " · ".join(map(str, facts)), class_="sub"),
        _tiles(report),
        _lost(report),
        tag("ul", *(tag("li", note) for note in found), class_="notes", aria_label="Notes")
        if found
        else None,
        tag("nav", *(tag("a", title, href=f"#{key}") for key, title, _ in sections),
            aria_label="Sections"),
    )  # fmt: skip


def _tiles(report: Report) -> Markup:
    plan = report.plan
    before, after = plan["before"], plan["after"]
    was, now = before["total_bytes"], after["total_bytes"]
    saved = f", {size_text(was - now)} ({percent(1 - now / was)}) saved" if now < was else ""
    fine = "as it was" if now == was else f"was {size_text(was)}{saved}"
    tiles = [("Size", size_text(now), fine)]
    asked = plan["size_asked"]
    tiles += [
        (
            "Experts",
            percent(plan["size_reached"]),
            "of their numbers" + ("" if asked is None else f"; asked {percent(asked)}"),
        ),
        (
            "Active",
            size_text(active_numbers(after), ""),
            f"parameters a token; was {size_text(active_numbers(before), '')}",
        ),
        ("Work", f"{plan['flops_ratio']:.3f}×", "operations a token in the experts"),
    ]
    final = final_errors(report)
    if final:
        tiles.append(
            (
                "Layers off by",
                f"{mean_square(final.values()):.3f}",
                "relative error of their answers",
            )
        )
    if (nats := foreseen(report)) is not None:
        of_what = "nats a token, " + ("factors alone" if report.compressed else "not measured")
        tiles.append(("Foreseen", f"{nats:.3g}", of_what))
    if report.rows and not final:
        tiles.append(("Weights off by", f"{report.error():.3f}", "relative Frobenius error"))
    return tag(
        "dl",
        *(
            tag(
                "div",
                tag("dt", name),
                tag("dd", value, class_="big"),
                tag("dd", fine, class_="fine") if fine else None,
            )
            for name, value, fine in tiles
        ),
        class_="tiles",
    )


def _lost(report: Report) -> Markup:
    """What is known of the harm, and what is not."""
    return tag(
        "div",
        tag("h2", "What was lost"),
        *(tag("p", text) for text in _harm(report)),
        tag("p", _advice(report)),
        class_="lost",
    )


def _harm(report: Report) -> Iterable[str]:
    final = final_errors(report)
    if report.kind == "materialize":
        yield (
            "Nothing more than the conversion had lost: the factors were multiplied out. What "
            "that was stands in its own report, molae-report.source.json."
        )
        return
    if not report.rows and not final:
        yield "Nothing: every tensor has the source's bytes."
        return
    if final:
        worst = max(final, key=lambda layer: final[layer])
        yield (
            f"On the calibration text the answers of a layer of experts are {_error(final)} off "
            f"(root mean square over {len(final)} layers); those of layer {worst} the most, "
            f"{final[worst]:.3f}."
        )
    if report.healed:
        first = mean_square(row.layer_error[0] for row in report.healed)
        yield f"Before the training it was {first:.3f}."
    if (nats := foreseen(report)) is not None:
        yield (
            f"About {nats:.3g} nats a token were foreseen for the factors, as Kullback-Leibler "
            "divergence of the next-token distributions: read off what one type of one layer did "
            "while it alone was small, and added up, before any refit. It decided where the size "
            "went; it was not measured on the result."
        )
    if report.rows:
        worst_row = max(report.rows, key=lambda row: row.expert_error_max)
        yield (
            f"The weights are {report.error():.3f} off (relative Frobenius error, root mean square "
            f"over layers and types); those of the worst expert, in {worst_row.kind} of layer "
            f"{worst_row.layer}, {worst_row.expert_error_max:.3f}."
        )


def _error(final: Mapping[int, float]) -> str:
    return f"{mean_square(final.values()):.3f}"


def _advice(report: Report) -> Markup:
    if report.kind == "materialize":
        first = "The result's text is measured by:"
    elif calibrated(report):
        first = (
            "It was fitted to this very text, so other texts fare worse. What it does to the "
            "model's text is measured by:"
        )
    else:
        first = (
            "No text ran through the model, so nothing here says how its answers changed. That "
            "is measured by:"
        )
    return join((first, tag("code", "molae eval DST --text FILE --against SRC")))


# ------------------------------------------------------------------------ tables


def _card(title: str, text: str, *content: Markup) -> Markup:
    return tag(
        "div", tag("h3", title), tag("p", text, class_="sub") if text else None, *content,
        class_="card",
    )  # fmt: skip


def _size_table(report: Report) -> Markup:
    before, after = report.plan["before"], report.plan["after"]

    def row(name: str, was: float, now: float) -> tuple[str, str, str, str]:
        return name, whole(was), whole(now), f"{now / was:.4f}" if was else ""

    keys = (
        ("experts, numbers", "expert_numbers"),
        ("all, numbers", "total_numbers"),
        ("experts, bytes", "expert_bytes"),
        ("all, bytes", "total_bytes"),
        ("operations a token, experts", "flops_per_token"),
    )
    rows = [row(name, before[key], after[key]) for name, key in keys]
    rows.insert(2, row("active for a token", active_numbers(before), active_numbers(after)))
    return _card(
        "Before and after",
        "Active: all but the experts, and of these what a token meets if its router picks evenly.",
        table(None, ("", "before", "after", "share"), rows),
    )


def _types_table(report: Report) -> Markup | None:
    types = report.plan["types"]
    if not types:
        return None
    stored = report.plan["before" if report.kind == "materialize" else "after"]["numbers"]
    rows = []
    for kind, (_, name, _) in figures.LOOKS.items():
        if kind not in types:
            rows.append((name, "as it was", "", "", size_text(stored[kind]["dense"], "")))
            continue
        own, numbers = types[kind], stored[kind]
        rows.append(
            (
                name,
                _several(own["group_sizes"]),
                _several(own["ranks"]),
                size_text(numbers["shared"], ""),
                size_text(numbers["private"] + numbers["dense"], ""),
            )
        )
    tried = report.plan["candidates"]
    more: tuple[Markup, ...] = ()
    if tried:
        more = (
            tag(
                "details",
                tag("summary", "Group sizes that were tried"),
                table(
                    None,
                    ("type", "experts a group", "rank", "error foreseen", ""),
                    [
                        (
                            figures.LOOKS[c["kind"]][1],
                            c["group_size"],
                            c["rank"],
                            f"{c['error']:.4f}",
                            "taken" if c["chosen"] else "",
                        )
                        for c in tried
                    ],
                    texts=(0, 4),
                ),
            ),
        )
    return _card(
        "How the experts are stored",
        "Numbers of all layers together. Indices of the gauge form are not counted.",
        table(None, ("type", "experts a group", "ranks", "shared", "private"), rows),
        *more,
    )


def _several(values: Iterable[int | None]) -> str:
    shown = ["dense" if value is None else str(value) for value in values]
    return ", ".join(shown) if len(shown) <= 4 else f"{shown[0]} to {shown[-1]}"


def _worst_table(report: Report) -> Markup | None:
    rows = []
    for kind in kinds_of(report):
        own = [row for row in report.rows if row.kind == kind]
        rows.append(
            (
                figures.LOOKS[kind][1],
                f"{report.error(kind):.4f}",
                f"{min(row.expert_error_min for row in own):.4f}",
                f"{max(row.expert_error_max for row in own):.4f}",
            )
        )
    if not rows:
        return None
    return _card(
        "Weights, best and worst experts",
        "Relative Frobenius error: of the type over all layers, and of single experts.",
        table(None, ("type", "all", "best expert", "worst expert"), rows),
    )


def _compressed_text(report: Report) -> str:
    light = report.plan["light"]
    return (
        f"The last of a token's {report.plan['letters']['K']} experts do not run; {light} act in "
        "their place."
        if light
        else ""
    )


def _settings_card(report: Report) -> Markup | None:
    rows = list(_flat(report.settings))
    if not rows:
        return None
    return _card("Settings", "", table(None, ("setting", "value"), rows, texts=(0, 1)))


def _versions_card(report: Report) -> Markup:
    plan = report.plan
    rows = [
        *_flat(report.versions),
        ("layout of the source", plan["layout"]),
        ("peak memory, foreseen", size_text(plan["memory_bytes"])),
        ("time in all", time_text(report.seconds)),
    ]
    return _card("Versions and machine", "", table(None, ("", "value"), rows, texts=(0, 1)))


def _workers_card(report: Report) -> Markup | None:
    if not report.workers:
        return None
    rows = [
        (row.host, row.threads, len(row.files), "; ".join(row.differs) or "no")
        for row in report.workers
    ]
    return _card(
        "Machines",
        f"{len(rows)} processes computed it.",
        table(None, ("host", "threads", "files", "another build"), rows, texts=(0, 3)),
    )


def _flat(values: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    """Settings within settings on lines of their own; a checkpoint's files are left to the
    report."""
    for key, value in values.items():
        name = f"{above}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            if key != "files":
                yield from _flat(value, f"{name}, ")
        elif value is not None:
            yield name, _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef"):
        return value[:12] + "…"  # a hash, to compare by eye
    return f"{value:,}" if isinstance(value, int) else str(value)


def _files_card(report: Report) -> Markup:
    entries = sorted(report.files.items())
    total = sum(entry["bytes"] for _, entry in entries)
    return _card(
        "Files",
        f"{len(entries) + 2} files with the report and this page; {size_text(total)} without them.",
        tag(
            "details",
            tag("summary", "Sizes and SHA-256"),
            table(
                None,
                ("file", "bytes", "SHA-256"),
                [(n, whole(e["bytes"]), tag("code", e["sha256"])) for n, e in entries],
                texts=(0, 2),
            ),
        ),
    )

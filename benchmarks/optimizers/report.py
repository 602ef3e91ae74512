"""From the results to the tables and pictures of docs/optimizer.md."""

import json
import math
import pathlib
import re

import numpy as np
from methods import METHODS, OF_SWEEP
from tasks import EVERY, SWEPT, TASKS

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "optimizers"
PAGE = ROOT / "docs" / "optimizer.md"
IMAGES = ROOT / "docs" / "images"

#: Where the results of variants.py are, beside those of the tasks.
VARIANTS = "variants"

BASELINE = "AdamW"
DRAWN = {
    "AdamW": "C1",
    "Muon": "C7",
    "SOAP": "C4",
    "Sophia": "C2",
    "DiagonalNewton, entries": "C0",
    "DiagonalNewton, defaults": "C3",
    "DiagonalNewton, axes": "C3",
    "axes, without curvature": "C3",
}


def load(task):
    """The results of a task by method; empty if there are none."""
    path = RESULTS / f"{task}.json"
    return json.loads(path.read_text())["results"] if path.exists() else {}


def save(task, results, environment):
    """Writes the results of a task, rounded to what the figures are good for."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "results": _rounded(results)}
    text = json.dumps(content, indent=1)
    # Lists of numbers on one line.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m.group().split()), text)
    (RESULTS / f"{task}.json").write_text(text + "\n")


def _rounded(x):
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_rounded(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    return x


def finals(result, key="held_out"):
    """The final losses of all seeds; infinite where training diverged."""
    losses = [
        run["held_out"][-1] if key == "held_out" else run["final_train"]
        for run in result["runs"]
    ]
    return np.array([math.inf if loss is None else loss for loss in losses])


def steps_to(result, target):
    """Median over the seeds of the steps until the target is reached.

    Interpolated between evaluations; infinite if most seeds do not get there.
    """
    found = []
    for run in result["runs"]:
        losses = [math.inf if x is None else x for x in run["held_out"]]
        hits = [i for i, loss in enumerate(losses) if loss <= target]
        steps = run["steps"]
        if not hits:
            found.append(math.inf)
        elif hits[0] and math.isfinite(losses[hits[0] - 1]):
            i = hits[0]
            part = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
            found.append(steps[i - 1] + part * (steps[i] - steps[i - 1]))
        else:
            found.append(steps[hits[0]])
    return float(np.median(found))


def milliseconds(name, result):
    """Processor time per step, curvature included; unknown times are `nan`."""
    times = result.get("milliseconds")
    refresh = METHODS[name].refresh
    return times["step"] + times["delivery"] / refresh if times else math.nan


def sensitivity(result):
    """Worst held-out loss over best, in the hundredfold range that is tried first."""
    losses = [math.inf if x is None else x for _, _, x in result["trials"]]
    return max(losses[:5]) / min(losses) if losses else math.nan


def summary(task, results):
    """One dictionary of figures for each method."""
    base = results[BASELINE]
    target = finals(base).mean()
    budget = EVERY[task].steps
    rows = {}
    for name in METHODS:
        if name not in results:
            continue
        result = results[name]
        held_out, train = finals(result), finals(result, "train")
        steps = steps_to(result, target) / budget
        cost = milliseconds(name, result)
        times = result.get("milliseconds") or {"step": math.nan, "delivery": math.nan}
        rows[name] = {
            "held_out": held_out.mean(),
            "spread": held_out.std(ddof=1) if len(held_out) > 1 else math.nan,
            "train": train.mean(),
            "steps": steps,
            "seconds": steps * cost / milliseconds(BASELINE, base),
            "sensitivity": sensitivity(result),
            "milliseconds": times["step"],
            "delivery": times["delivery"],
            "share": 1 - times["step"] / cost,
            "rate": result["learning_rate"],
        }
    return rows


def _table(figures, cell, tasks, methods):
    names = [n for n in methods if any(n in rows for rows in figures.values())]
    lines = ["| task | " + " | ".join(names) + " |"]
    lines.append("|---|" + "---|" * len(names))
    for task, rows in figures.items():
        cells = [cell(rows[n], rows) if n in rows else "" for n in names]
        lines.append(f"| {tasks[task].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _loss(key):
    def cell(row, rows):
        value = row[key]
        if not math.isfinite(value) or value > 100:
            return "diverged"
        text = f"{value:.3g}" if value < 0.1 else f"{value:.4g}"
        if key == "held_out" and math.isfinite(row["spread"]):
            text += f" ± {row['spread']:.1g}"
        best = min(r[key] for r in rows.values())
        return f"**{text}**" if value == best else text

    return cell


def _plain(key, form):
    def cell(row, rows):
        if math.isnan(row[key]):
            return ""
        return form.format(row[key]) if math.isfinite(row[key]) else "–"

    return cell


def tables(figures):
    """All tables, as Markdown."""
    parts = [
        (
            "Final held-out loss, mean ± standard deviation over the seeds",
            "held_out",
            None,
        ),
        ("Final training loss", "train", None),
        ("Steps to AdamW's final held-out loss, over its budget", "steps", "{:.2f}"),
        ("Seconds to it, over AdamW's", "seconds", "{:.2f}"),
        (
            "Worst over best held-out loss in a hundredfold range of rates",
            "sensitivity",
            "{:.2f}",
        ),
        ("Milliseconds per step, without curvature", "milliseconds", "{:.2f}"),
        ("Milliseconds per delivery of curvature", "delivery", "{:.1f}"),
        ("Share of the time spent on curvature", "share", "{:.0%}"),
        ("Learning rate", "rate", "{:.2g}"),
    ]
    fed = [name for name, method in METHODS.items() if method.curvature]
    return "\n\n".join(
        f"**{title}**\n\n"
        + _table(
            figures,
            _plain(key, form) if form else _loss(key),
            TASKS,
            fed if key in ("delivery", "share") else METHODS,
        )
        for title, key, form in parts
    )


def variants():
    """The best of each variant's three learning rates, over the best of Adam's."""
    results = load(VARIANTS)
    looked_at = [task for task in TASKS if task in results["Adam"]]
    lines = ["| variant | " + " | ".join(looked_at) + " |"]
    lines.append("|---|" + "---|" * len(looked_at))
    best = {
        name: {
            task: min(math.inf if x is None else x for x in losses.values())
            for task, losses in tasks.items()
        }
        for name, tasks in results.items()
    }
    for name, losses in best.items():
        cells = [
            f"{losses[task] / best['Adam'][task]:.3f}" if task in losses else ""
            for task in looked_at
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sweep():
    """Final held-out losses by size of the batches."""
    figures = {}
    for task in SWEPT:
        found = load(task)
        known = {method: found[method] for method in OF_SWEEP if method in found}
        figures[task] = summary(task, known)
    return _table(figures, _loss("held_out"), SWEPT, OF_SWEEP)


def _fill(mark, text):
    """Puts a text between its marks in the page."""
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, rest = PAGE.read_text().split(begin)
    after = rest.split(end)[1]
    PAGE.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def write():
    """Puts the tables between their marks in docs/optimizer.md; draws the pictures."""
    loaded = ((task, load(task)) for task in TASKS)
    all_results = {task: found for task, found in loaded if BASELINE in found}
    figures = {task: summary(task, results) for task, results in all_results.items()}
    _fill("tables", tables(figures))
    _fill("batches", sweep())
    _fill("variants", variants())
    draw_curves(all_results, "steps", IMAGES / "optimizer_steps.png")
    draw_curves(all_results, "seconds", IMAGES / "optimizer_seconds.png")
    draw_rates(all_results, IMAGES / "optimizer_learning_rates.png")


def _panels(tasks, path):
    """An axis for each task, in a picture that is saved when all are drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = math.ceil(len(tasks) / 4)
    figure, axes = pyplot.subplots(
        rows, 4, figsize=(13, 3 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for axis, task in zip(axes.flat, tasks, strict=False):
        axis.set_title(TASKS[task].title, fontsize=10, loc="left")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        yield axis, task
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=80)


def _style(name):
    ls = "--" if "defaults" in name else ":" if "without" in name else "-"
    return {"color": DRAWN[name], "ls": ls, "lw": 1.4}


def draw_curves(all_results, key, path):
    """Held-out loss against steps or seconds, median of the seeds.

    Against seconds those are drawn whose steps were timed on every task.
    """
    timed = [
        name
        for name in DRAWN
        if all("milliseconds" in found.get(name, ()) for found in all_results.values())
    ]
    for axis, task in _panels(all_results, path):
        results = all_results[task]
        lowest = math.inf
        for name in timed if key == "seconds" else DRAWN:
            if name not in results:
                continue
            runs = results[name]["runs"]
            shortest = min(len(run["steps"]) for run in runs)
            x = np.array(runs[0]["steps"][:shortest], float)
            if key == "seconds":
                x *= milliseconds(name, results[name]) / 1e3
            y = np.array([run["held_out"][:shortest] for run in runs], float)
            y = np.median(y, axis=0)
            lowest = min(lowest, np.nanmin(y))
            axis.plot(x, y, label=name, **_style(name))
        axis.set_yscale("log")
        # Down from where AdamW ends, if that is far above.
        top = max(2 * lowest, 1.1 * finals(results[BASELINE]).mean())
        axis.set_ylim(lowest * 0.98, min(axis.get_ylim()[1], top))
        axis.set_xlabel(key)


def draw_rates(all_results, path):
    """Held-out loss of the tuning trials against the learning rate."""
    for axis, task in _panels(all_results, path):
        results = all_results[task]
        lowest = math.inf
        for name in DRAWN:
            trials = results.get(name, {}).get("trials")
            if not trials:
                continue
            value = METHODS[name].values[0]
            points = sorted(
                (rate, math.inf if loss is None else loss)
                for rate, v, loss in trials
                if v == value
            )
            x, y = np.array(points).T
            lowest = min(lowest, y.min())
            axis.plot(x, y, marker=".", label=name, **_style(name))
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(
            lowest * 0.98, max(lowest * 2, 1.1 * finals(results[BASELINE]).mean())
        )
        axis.set_xlabel("learning rate")

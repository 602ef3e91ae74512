"""What the examples share: the option `--picture`, and the look of their pictures."""

import argparse
import pathlib

IMAGES = pathlib.Path(__file__).resolve().parent.parent / "docs" / "images"


def arguments(doc, name, **options):
    """The command line of an example: `--picture [PATH]`, and options of its own."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--picture",
        type=pathlib.Path,
        nargs="?",
        const=IMAGES / f"{name}.png",
        help="draws what was found, to docs/images unless a path follows",
    )
    for option, described in options.items():
        parser.add_argument(f"--{option}", **described)
    return parser.parse_args()


def new(rows, columns, size):
    """An empty picture and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained")


def dress(ax, title, x, y=None, legend=True):
    """Title, labels, a light grid and a legend."""
    ax.set_title(title, fontsize=10.5, loc="left")
    ax.set_xlabel(x)
    if y:
        ax.set_ylabel(y)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        ax.legend(frameon=False, fontsize=9)


def save(figure, path):
    """Writes the picture and says where it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    print(f"\n  The picture is in {path}.")

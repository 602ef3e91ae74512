"""What the scripts have in common that compare something task by task."""

import argparse
import warnings

import measure


def main(doc, tasks, of_task, name, title):
    """Measures the tasks that are asked for on the command line, or all.

    Args:
        doc: the script's docstring.
        tasks: names of tasks.
        of_task: function of such a name; returns a list of rows.
        name: of the file of results, which is written after each task.
        title: of the table that is printed.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    results = []
    for task in parser.parse_args().tasks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results += of_task(task)
        measure.save(name, results)
    measure.print_table(title, results)

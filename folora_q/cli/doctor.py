"""`folora-q doctor`: check whether training can work on this machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import nullcontext

import rich_click as click
from rich.markup import escape

from folora_q import __version__
from folora_q.cli.console import err, out, output, visible
from folora_q.doctor import CHECKS, Examiner, Finding, State, can_train, without_user

SIGNS = {
    State.GOOD: "[green]✓[/]",
    State.NOTE: "[dim]·[/]",
    State.WARNING: "[yellow]![/]",
    State.FAILURE: "[bold red]✗[/]",
}
WIDTH = max(len(check.name) for check in CHECKS)


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for a bug report, without user names and tokens.")
@click.pass_obj
def command(settings: dict[str, bool], as_json: bool) -> int:
    """Check whether training can work on this machine, and say how to fix each problem.

    Runs a 4-bit layer forward and backward and checks its numbers. Exit code 0: training can work; 1: it cannot.
    """
    findings = []
    for finding in _examine(settings["debug"]):
        findings.append(finding)
        if not as_json:
            _print(finding)
    works = can_train(findings)
    if as_json:
        click.echo(_json(findings))
    else:
        _conclude(findings)
    return 0 if works else 1


def _examine(debug: bool) -> Iterator[Finding]:
    with Examiner(verbose=debug) as examiner:
        for check in CHECKS:
            # Nothing is shown without a terminal.
            with nullcontext() if output.quiet else err.status(f"[dim]checking {check.name}[/]"):
                findings = examiner.make(check)
            yield from findings


def _print(finding: Finding) -> None:
    fact = escape(visible(finding.fact))
    out.print(f"{SIGNS[finding.state]} [dim]{finding.name:{WIDTH}}[/]  {fact}", soft_wrap=True)
    if finding.fix:
        out.print(f"  {'':{WIDTH}}  [cyan]→ {escape(visible(finding.fix))}[/]", soft_wrap=True)


def _conclude(findings: list[Finding]) -> None:
    wrong = sum(finding.state is State.FAILURE for finding in findings)
    if wrong:
        out.print(f"\n[bold red]Not ready to train:[/] {wrong} {'problem' if wrong == 1 else 'problems'} to fix (✗)")
    else:
        out.print("\n[bold]Training can work on this machine.[/]")


def _json(findings: list[Finding]) -> str:
    report = {
        "folora_q": __version__,
        "platform": platform.platform(),
        "can_train": can_train(findings),
        "findings": [vars(without_user(finding)) for finding in findings],
    }
    return json.dumps(report, indent=2, ensure_ascii=False)

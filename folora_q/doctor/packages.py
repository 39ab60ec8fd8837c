"""Check Python and the libraries: installed, in the supported range, and importable."""

from __future__ import annotations

import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, version
from importlib.util import find_spec

from folora_q.doctor.findings import Finding, State, root_cause
from folora_q.doctor.nvidia import ask_driver, torch_install
from folora_q.doctor.pip import install_missing, pip_install
from folora_q.doctor.requirements import ordered, ranges, requirement, within
from folora_q.errors import first_line

# The libraries that training requires, each with a name to import from it: some load nothing until then.
STACK = {
    "torch": "Tensor",
    "bitsandbytes": "nn",
    "transformers": "AutoModelForCausalLM",
    "peft": "LoraConfig",
    "trl": "SFTTrainer",
    "accelerate": "Accelerator",
    "datasets": "Dataset",
}


def check_python() -> list[Finding]:
    """Check the interpreter's version, and pip, by which the demo fetches its model."""
    from packaging.specifiers import SpecifierSet

    running = platform.python_version()
    try:
        needed = metadata("folora-q")["Requires-Python"]
    except PackageNotFoundError:
        fact = f"{running}; folora-q is not installed here, so the versions that it requires are unknown"
        return [Finding("python", State.WARNING, fact, pip_install("-e", "."))]
    if not within(running, SpecifierSet(needed)):
        fix = "create an environment with a newer one: python3.12 -m venv .venv"
        return [Finding("python", State.FAILURE, f"{running}, outside {needed}", fix)]
    findings = [Finding("python", State.GOOD, f"{running} (needs {needed})")]
    if find_spec("pip") is None:
        fact = "not in this environment; the demo fetches its model with it"
        findings.append(Finding("pip", State.WARNING, fact, pip_install("pip")))
    return findings


def check_package(name: str) -> list[Finding]:
    """Check one library of STACK."""
    specifier = ranges().get(name)
    try:
        found = version(name)
    except PackageNotFoundError:
        return [Finding(name, State.FAILURE, "not installed", _install(name))]
    if specifier is not None and not within(found, specifier):
        return [Finding(name, State.FAILURE, f"{found}, outside {ordered(specifier)}", _install(name))]
    try:
        getattr(import_module(name), STACK[name])
    except Exception as error:
        cause = root_cause(error)
        return [Finding(name, State.FAILURE, f"{found} does not load: {first_line(cause)}", _mend(name, cause))]
    return [Finding(name, State.GOOD, found if specifier is None else f"{found} (needs {ordered(specifier)})")]


def check_other_packages() -> list[Finding]:
    """Check all other requirements; return a finding for each problem, or one for all."""
    others = {name: specifier for name, specifier in ranges().items() if name not in STACK}
    findings = []
    for name, specifier in others.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            findings.append(Finding(name, State.FAILURE, "not installed", _install(name)))
            continue
        if not within(found, specifier):
            findings.append(Finding(name, State.FAILURE, f"{found}, outside {ordered(specifier)}", _install(name)))
    if others and not findings:
        return [Finding("the rest", State.GOOD, f"{len(others)} more packages, within their ranges")]
    return findings


def _install(name: str) -> str:
    return torch_install(ask_driver(), requirement(name)) if name == "torch" else pip_install(requirement(name))


def _mend(name: str, cause: BaseException) -> str:
    """Return the fix for an installed package that does not load: it lacks another package, or is broken."""
    if isinstance(cause, ModuleNotFoundError) and cause.name in STACK and cause.name != name:
        return f"fix {cause.name} first"
    if install := install_missing(cause):
        return install
    return _install(name) if name == "torch" else pip_install("--force-reinstall", "--no-deps", requirement(name))

"""Holds launch files against published schemas: Kubernetes' (kubernetes-validate), KServe's (the models of its client,
read as text) and compose's (compose-spec). Runs in an environment of its own: python schemas.py FOLDER
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

KUBERNETES = "1.34"


def main(folder: Path) -> int:
    problems = [f"{path.name}: {problem}" for path in sorted(folder.glob("*.yaml")) for problem in faults(path)]
    print("\n".join(problems))
    return bool(problems)


def faults(path: Path) -> list[str]:
    import yaml

    text = path.read_text(encoding="utf-8")
    if path.name == "compose.yaml":
        return of_compose(text)
    found = []
    for document in yaml.safe_load_all(text):
        found += of_kserve(document) if "kserve" in document["apiVersion"] else of_kubernetes(document)
    return found


def of_kubernetes(document: Any) -> list[str]:
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{document.get('kind')}: {error.message}"]
    return []


def of_compose(text: str) -> list[str]:
    """With the defaults of its variables, as compose puts them in before it reads the file."""
    import compose_spec

    try:
        compose_spec.PyCompose.from_yaml(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)).validate()
    except Exception as error:
        return [str(error)]
    return []


def of_kserve(document: Any) -> list[str]:
    """Keys and types by KServe's models, down to those of Kubernetes; containers and volumes by Kubernetes' schema."""
    found = list(of_model(document, "V1beta1InferenceService"))
    predictor = document["spec"].get("predictor", {})
    pod = {key: predictor.get(key, []) for key in ("containers", "volumes")}
    wrapped = {"apiVersion": "v1", "kind": "Pod", "metadata": document["metadata"], "spec": pod}
    return found + of_kubernetes(wrapped)


def of_model(value: Any, name: str) -> list[str]:
    """The keys of a value that a model of KServe does not have, and values of other types."""
    fields = model(name)
    if fields is None:
        return []
    if not isinstance(value, dict):
        return [f"{name} must be a mapping"]
    found = [f"{name} has no {key}" for key in value.keys() - fields.keys()]
    for key in value.keys() & fields.keys():
        kind = fields[key]
        inner = re.fullmatch(r"list\[(\w+)\]", kind)
        plain: dict[str, type] = {"str": str, "int": int, "bool": bool}
        if inner and not isinstance(value[key], list):
            found.append(f"{name}.{key} must be a list")
        elif inner:
            found += [problem for each in value[key] for problem in of_model(each, inner[1])]
        elif kind in plain and type(value[key]) is not plain[kind]:
            found.append(f"{name}.{key} must be {kind}")
        else:
            found += of_model(value[key], kind)
    return found


def model(name: str) -> dict[str, str] | None:
    """The JSON keys of a model of KServe with their types; None for one of another package."""
    spec = importlib.util.find_spec("kserve")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    path = Path(spec.submodule_search_locations[0], "models", f"{file}.py")
    if not path.is_file():
        return None
    tables: dict[str, dict[str, str]] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict):
            tables[node.targets[0].id] = ast.literal_eval(node.value)
    return {key: tables["openapi_types"][field] for field, key in tables["attribute_map"].items()}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""`qexport check`: each planted fault is refused, with its own message."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

import releases
from qexport.artifact.agreement import verification_of
from qexport.artifact.digests import sha256_file
from qexport.artifact.integrity import digest_files, write_listing
from qexport.artifact.manifest import Manifest
from qexport.artifact.report import Report
from qexport.cli import main
from qexport.errors import QexportError
from qexport.release.checking import check
from qexport.release.record import proof_of
from qexport.reporting.writing import write_report

NAME = "tiny-notes-1.4.0+w8a8.vllm"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed release of one layout, its key, and another one."""
    folder = tmp_path_factory.mktemp("made")
    artifact = releases.proven(folder) / "vllm"
    releases.key(folder)
    releases.key(folder, "other")
    command = ["release", str(artifact), "--to", str(folder), "--version", releases.VERSION]
    assert main([*command, "--sign", str(folder / "release.key")]) == 0
    (folder / f"{NAME}.sha256").unlink()
    return folder


@pytest.fixture
def release(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made / NAME, tmp_path / "copy"))


def message(folder: Path, key: Path | None = None) -> str:
    with pytest.raises(QexportError) as caught:
        check(folder, key=key)
    return f"{caught.value.what}: {caught.value.where}"


def flip(path: Path, at: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def sealed(folder: Path) -> None:
    """Manifest and listing made anew, as somebody would do who hides a change."""
    files = digest_files(folder, {})
    files.pop("model.sig", None)
    manifest = Manifest.read(folder).model_copy(update={"files": files})
    manifest.write(folder)
    write_listing(folder, manifest)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def test_a_release_passes_with_its_key_and_says_what_was_not_checked_without(
    made: Path, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(release), "--signature", str(made / "release.pub")]) == 0
    assert "signature  of the given key, over every file" in capsys.readouterr().out
    assert main(["check", str(release)]) == 0
    assert "not checked: give --signature" in capsys.readouterr().out
    assert main(["check", str(release), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signature_checked"] is False


def test_a_check_without_a_signature_imports_neither_torch_nor_the_extra(release: Path) -> None:
    program = (
        "import sys; from qexport.cli import main; code = main(['check', sys.argv[1]]); "
        "loaded = {'torch', 'transformers', 'model_signing', 'cyclonedx'} & sys.modules.keys(); "
        "print(loaded, file=sys.stderr); sys.exit(code or bool(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", program, release], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model.safetensors", "a file of the artifact has changed since it was written"),
        ("config.json", "a file of the artifact has changed since it was written"),
        ("launch/kserve.yaml", "a file of the artifact has changed since it was written"),
        ("README.md", "the model card has been edited since the release"),
        ("report/report.json", "the report is not the one that was released"),
        ("report/report.html", "the report is not the one that was released"),
        ("release.json", "a file of the release's evidence has been changed"),
        ("evidence/bom.cdx.json", "a file of the release's evidence has been changed"),
        ("evidence/provenance.json", "a file of the release's evidence has been changed"),
    ],
)
def test_one_flipped_bit_is_found(release: Path, file: str, words: str) -> None:
    flip(release / file)
    assert message(release) == f"{words}: {release / file}"


def test_one_flipped_bit_anywhere_is_found(made: Path, release: Path) -> None:
    for path in sorted(path for path in release.rglob("*") if path.is_file()):
        content = path.read_bytes()
        flip(path, len(content) // 2)
        with pytest.raises(QexportError):
            check(release, key=made / "release.pub")
        path.write_bytes(content)
    check(release, key=made / "release.pub")


@pytest.mark.parametrize("file", ["evidence/bom.cdx.json", "evidence/provenance.json", "release.json"])
def test_a_missing_file_of_evidence_is_named(release: Path, file: str) -> None:
    (release / file).unlink()
    assert message(release) == f"a file of the release's evidence is missing: {release / file}"


def test_a_further_file_is_named(release: Path) -> None:
    (release / "pytorch_model.bin").write_bytes(b"x")
    assert message(release) == f"there is a file that the release does not have: {release / 'pytorch_model.bin'}"


def test_a_missing_and_a_foreign_signature(made: Path, release: Path) -> None:
    assert message(release, made / "other.pub").startswith("the signature was made with another key")
    (release / "model.sig").unlink()
    assert message(release).startswith("the release was signed, and its signature is missing")
    assert message(release, made / "release.pub").startswith("the release is not signed")


def test_a_malformed_signature(made: Path, release: Path) -> None:
    for content in ("", "{}", "[]", "{" * 9999, '{"mediaType": 1}'):
        (release / "model.sig").write_text(content)
        assert message(release, made / "release.pub").startswith("the signature is malformed"), content


def test_a_release_that_somebody_else_has_signed_anew(made: Path, release: Path) -> None:
    from qexport.release.signing import Signer

    Signer(made / "other.key").sign(release)
    check(release)
    assert message(release, made / "release.pub").startswith("the signature was made with another key")


def edit_card(folder: Path) -> None:
    path = folder / "README.md"
    path.write_text(path.read_text().replace("Passed: ", "Passed easily: "))


def edit_card_and_record(folder: Path) -> None:
    edit_card(folder)
    name_evidence(folder)


def edit_launch(folder: Path) -> None:
    path = folder / "launch" / "compose.yaml"
    path.write_text(path.read_text().replace("vllm/vllm-openai", "evil/vllm-openai"))


def other_base(folder: Path) -> None:
    edit_json(folder / "release.json", lambda content: content["base"].update(name="other"))


def other_input(folder: Path) -> None:
    def change(content: Any) -> None:
        content["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"]["sha256"] = "0" * 64

    edit_json(folder / "evidence/provenance.json", change)
    name_evidence(folder)


def other_recipe(folder: Path) -> None:
    def change(content: Any) -> None:
        content["predicate"]["buildDefinition"]["externalParameters"]["recipe"]["quantize"]["method"] = "nf4"

    edit_json(folder / "evidence/provenance.json", change)
    name_evidence(folder)


def other_bom(folder: Path) -> None:
    def change(content: Any) -> None:
        content["metadata"]["component"]["components"][0]["hashes"][0]["content"] = "0" * 64

    edit_json(folder / "evidence/bom.cdx.json", change)
    name_evidence(folder)


def other_text(folder: Path) -> None:
    def change(content: Any) -> None:
        text = next(each for each in content["components"] if each["type"] == "data")
        text["hashes"][0]["content"] = "0" * 64

    edit_json(folder / "evidence/bom.cdx.json", change)
    name_evidence(folder)


def other_package(folder: Path) -> None:
    def change(content: Any) -> None:
        torch = next(each for each in content["components"] if each["name"] == "torch")
        torch.update(version="9.9", purl="pkg:pypi/torch@9.9")

    edit_json(folder / "evidence/bom.cdx.json", change)
    name_evidence(folder)


def further_component(folder: Path) -> None:
    edit_json(folder / "evidence/bom.cdx.json", lambda content: content["components"].append({"name": "safe"}))
    name_evidence(folder)


def other_figure(folder: Path) -> None:
    def change(content: Any) -> None:
        card = content["metadata"]["component"]["modelCard"]
        card["quantitativeAnalysis"]["performanceMetrics"][0]["value"] = "0.0"

    edit_json(folder / "evidence/bom.cdx.json", change)
    name_evidence(folder)


def no_list_of_architectures(folder: Path) -> None:
    """With evidence that has the digest of the file as it is now."""
    path = folder / "config.json"
    before = sha256_file(path)
    edit_json(path, lambda content: content.update(architectures=5))
    for evidence in (folder / "evidence").glob("*.json"):
        evidence.write_text(evidence.read_text().replace(before, sha256_file(path)))
    name_evidence(folder)


def a_key_twice(folder: Path) -> None:
    """Readers differ in which of the two they take."""
    path = folder / "evidence/provenance.json"
    path.write_text(path.read_text().replace("{", '{"_type": "other",', 1))
    name_evidence(folder)


def edit_page(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "report" / name
        path.write_text(path.read_text() + " ")

    return change


def further_page(folder: Path) -> None:
    (folder / "report/more.html").write_text("all is well")


def swap_report(folder: Path) -> None:
    report = Report.read(folder)
    figures = [each.model_copy(update={"n": each.n + 1}) for each in report.figures]
    write_report(report.model_copy(update={"figures": figures}), folder / "report")


def gate_left_out(folder: Path) -> None:
    """Of the report and everything that repeats it but the card."""
    report = Report.read(folder)
    report = report.model_copy(update={"gates": [each for each in report.gates if each.name != "mean_kl"]})
    write_report(report, folder / "report")
    Manifest.read(folder).model_copy(update={"verification": verification_of(report)}).write(folder)
    proof = proof_of(report)
    assert proof is not None
    edit_json(folder / "release.json", lambda content: content.update(proof=proof.model_dump(mode="json")))


def other_name(folder: Path) -> None:
    edit_json(folder / "release.json", lambda content: content.update(name="x\nsignature  of the given key"))


def foreign_evidence(folder: Path) -> None:
    edit_json(folder / "release.json", lambda content: content["evidence"].update({"/etc/passwd": "0" * 64}))


def further_launch_file(folder: Path) -> None:
    (folder / "launch/more.sh").write_text("#!/bin/sh\n")


def no_report(folder: Path) -> None:
    shutil.rmtree(folder / "report")


def name_evidence(folder: Path) -> None:
    """release.json with the digests of the evidence as it is now."""

    def change(content: Any) -> None:
        content["evidence"] = {name: sha256_file(folder / name) for name in content["evidence"]}

    edit_json(folder / "release.json", change)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (edit_card, "the model card has been edited since the release"),
        (edit_card_and_record, "the model card does not say what"),
        (edit_launch, "a launch file does not say what|the provenance names other inputs than the manifest: files"),
        (other_base, "release.json names other inputs than the manifest: base"),
        (other_input, "the provenance names other inputs than the manifest: inputs"),
        (other_recipe, "the provenance names other inputs than the manifest: recipe"),
        (other_bom, "the bill of materials names other files than the manifest"),
        (other_text, "the bill of materials names other files than the manifest: held-out text"),
        (other_package, "the bill of materials names other files than the manifest: torch"),
        (further_component, "the bill of materials names other files than the manifest: safe"),
        (other_figure, "the bill of materials does not say what manifest and report say"),
        (no_list_of_architectures, "the bill of materials does not say what manifest and report say"),
        (a_key_twice, "the provenance names other inputs than the manifest: form"),
        (edit_page("report.html"), "a file of the report does not say what report.json says"),
        (edit_page("report.md"), "a file of the report does not say what report.json says"),
        (edit_page("junit.xml"), "a file of the report does not say what report.json says"),
        (edit_page("report.json"), "a file of the report does not say what report.json says"),
        (further_page, "there are files that no report has: more.html"),
        (swap_report, "the report is not the one of this artifact: manifest and report contradict each other"),
        (gate_left_out, "the report's gates are not what its figures give: mean_kl"),
        (other_name, "release.json names other inputs than the manifest: name"),
        (foreign_evidence, "release.json names other inputs than the manifest: /etc/passwd"),
        (further_launch_file, "there are files that no release of this artifact has: launch/more.sh"),
        (no_report, "the report that was released is missing|manifest and SHA256SUMS contradict"),
    ],
    ids=[
        "card",
        "card and record",
        "launch",
        "base",
        "input",
        "recipe",
        "bom",
        "text",
        "package",
        "component",
        "figure",
        "architectures",
        "key twice",
        "page",
        "comment",
        "test results",
        "spaces",
        "further page",
        "report",
        "gate",
        "name",
        "evidence",
        "further file",
        "no report",
    ],
)
def test_a_change_that_was_hidden_from_the_digests_is_found(
    made: Path, release: Path, fault: Callable[[Path], object], words: str
) -> None:
    fault(release)
    sealed(release)
    told = message(release)
    assert any(told.startswith(each) for each in words.split("|")), told
    assert message(release, made / "release.pub").startswith(
        ("the signature is of other bytes than the folder's", "manifest and SHA256SUMS")
    )


def test_the_signatures_own_program_verifies_it(made: Path, release: Path) -> None:
    program = [str(Path(sys.executable).with_name("model_signing")), "verify", "key", str(release)]
    options = ["--signature", str(release / "model.sig"), "--public_key", str(made / "release.pub")]
    assert subprocess.run([*program, *options], capture_output=True, check=False).returncode == 0
    flip(release / "config.json")
    assert subprocess.run([*program, *options], capture_output=True, check=False).returncode != 0


def test_sha256sum_finds_a_flipped_bit(release: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=release, check=False).returncode == 0
    flip(release / "README.md")
    assert subprocess.run(command, cwd=release, check=False, capture_output=True).returncode == 1


def test_what_the_hub_puts_beside_the_files_does_not_matter_and_is_told_in_one_line(made: Path, release: Path) -> None:
    assert not [line for line in check(release).lines() if line.startswith("beside")]
    (release / ".cache/huggingface/download").mkdir(parents=True)
    for number in range(9):
        (release / f".cache/huggingface/download/{number}.metadata").write_text("")
    (release / ".gitattributes").write_text("")
    lines = list(check(release, key=made / "release.pub").lines())
    told = "beside     .cache, .gitattributes: huggingface_hub's own, not part of the release"
    assert [line for line in lines if "cache" in line] == [told]


def test_a_large_signature_is_not_read(made: Path, release: Path) -> None:
    os.truncate(release / "model.sig", (1 << 26) + 1)
    assert message(release, made / "release.pub").startswith("the signature has more than 67108864 bytes")


@pytest.mark.parametrize("name", ["qexport-manifest.json", "report/report.json"])
def test_a_large_record_is_not_read(release: Path, name: str) -> None:
    manifest = Manifest.read(release)
    os.truncate(release / name, (1 << 27) + 1)
    write_listing(release, manifest)
    assert message(release).startswith("the file has more than 134217728 bytes")


def test_pages_of_another_version_are_not_compared_and_that_is_said(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (release / "report/report.html").write_text("all is well")
    sealed(release)
    for module in ("checking", "made_again"):
        monkeypatch.setattr(f"qexport.release.{module}.version", lambda _: "9.9")
    found = check(release)
    assert (found.compared_card, found.compared_pages) == (False, False)
    lines = [line.split("  ")[0] for line in found.lines() if "not compared: made by qexport" in line]
    assert lines == ["card", "pages"]


@pytest.mark.parametrize(
    ("name", "words"), [("release.key", "private key"), ("recipe.yaml", "neither a public key"), ("no", "be read")]
)
def test_what_is_no_public_key_is_refused(made: Path, release: Path, name: str, words: str) -> None:
    assert words in message(release, made / name)


def certificate(
    folder: Path, name: str, days: tuple[int, int], signer: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None = None
) -> tuple[x509.Name, ec.EllipticCurvePrivateKey]:
    """A certificate that is valid from and to so many days from now, by a signer, or else by itself; and its key."""
    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signing = signer or (subject, key)
    usage = dict.fromkeys(
        ["content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign"], False
    )
    own = x509.KeyUsage(
        digital_signature=signer is not None, key_cert_sign=signer is None,
        encipher_only=False, decipher_only=False, **usage,
    )  # fmt: skip
    begin, end = (datetime.now(UTC) + timedelta(days=each) for each in days)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), 7, begin, end)
    builder = builder.add_extension(x509.BasicConstraints(ca=signer is None, path_length=None), critical=True)
    made = builder.add_extension(own, critical=True).sign(signing, hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(made.public_bytes(Encoding.PEM))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / f"{name}.key").write_bytes(private)
    return subject, key


@pytest.mark.parametrize(
    ("root", "leaf", "reason"),
    [
        ((-900, -100), (-800, -700), None),
        ((-900, 900), (100, 200), None),
        ((-900, -800), (-700, 700), "certificate has expired"),
        ((-100, 900), (-200, 200), "certificate is not yet valid"),
    ],
    ids=["both expired", "the leaf not yet valid", "the root expired before the leaf", "the root younger"],
)
def test_a_chain_is_checked_for_the_day_on_which_its_own_certificate_begins(
    release: Path, tmp_path: Path, root: tuple[int, int], leaf: tuple[int, int], reason: str | None
) -> None:
    from qexport.release.signing import Signer

    certificate(tmp_path, "leaf", leaf, certificate(tmp_path, "root", root))
    parts = [(tmp_path / name).read_bytes() for name in ("leaf.key", "leaf.pem", "root.pem")]
    (tmp_path / "both.pem").write_bytes(b"".join(parts))
    Signer(tmp_path / "both.pem").sign(release)
    if reason is None:
        assert check(release, key=tmp_path / "root.pem").signature
    else:
        told = message(release, tmp_path / "root.pem")
        assert told.startswith(f"the signature was made with another key, or was changed: {reason}")


def test_a_certificate_chain(made: Path, tmp_path: Path) -> None:
    """A root, a certificate that it has signed, and a foreign root."""
    for name in ("root", "stranger"):
        subject: list[str | Path] = ["-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign"]
        key: list[str | Path] = [
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-keyout",
            tmp_path / f"{name}.key",
        ]
        releases.openssl("req", "-x509", *key, *subject, "-days", "30", "-out", tmp_path / f"{name}.pem")
    private, _ = releases.key(tmp_path, "leaf")
    releases.openssl("req", "-new", "-key", private, "-subj", "/CN=leaf", "-out", tmp_path / "leaf.csr")
    (tmp_path / "ext").write_text("keyUsage=critical,digitalSignature\n")
    signer: list[str | Path] = [
        "-CA",
        tmp_path / "root.pem",
        "-CAkey",
        tmp_path / "root.key",
        "-extfile",
        tmp_path / "ext",
    ]
    releases.openssl(
        "x509", "-req", "-in", tmp_path / "leaf.csr", *signer, "-days", "30", "-out", tmp_path / "leaf.pem"
    )
    both = tmp_path / "both.pem"
    both.write_bytes(private.read_bytes() + (tmp_path / "leaf.pem").read_bytes() + (tmp_path / "root.pem").read_bytes())
    command = ["release", str(made / "out" / "safetensors"), "--to", str(tmp_path / "to"), "--version", "1"]
    assert main([*command, "--sign", str(both)]) == 0
    folder = tmp_path / "to" / "tiny-notes-1+w8a8"
    assert check(folder, key=tmp_path / "root.pem").signature
    assert message(folder, tmp_path / "stranger.pem").startswith("the signature was made with another key")
    assert message(folder, made / "release.pub").startswith("the signature was made with another key")


def test_an_encrypted_key_takes_its_password_from_the_environment(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
    releases.openssl("genpkey", *curve, "-aes256", "-pass", "pass:geheim", "-out", tmp_path / "enc.key")
    monkeypatch.setenv("PASS", "geheim")
    releases.openssl("ec", "-in", tmp_path / "enc.key", "-passin", "env:PASS", "-pubout", "-out", tmp_path / "enc.pub")
    command = ["release", str(made / "out" / "safetensors"), "--to", str(tmp_path / "to"), "--version", "1"]
    for password in (None, "falsch", "geheim"):
        if password is None:
            monkeypatch.delenv("QEXPORT_SIGNING_PASSWORD", raising=False)
        else:
            monkeypatch.setenv("QEXPORT_SIGNING_PASSWORD", password)
        assert main([*command, "--sign", str(tmp_path / "enc.key")]) == (0 if password == "geheim" else 2)
        captured = capsys.readouterr()
        assert "falsch" not in captured.err + captured.out
    assert check(tmp_path / "to" / "tiny-notes-1+w8a8", key=tmp_path / "enc.pub").signature
    assert os.environ["QEXPORT_SIGNING_PASSWORD"] == "geheim"

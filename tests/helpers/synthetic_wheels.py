"""Small zip files with the layout of the pinned wheels, and the table entries that go with them."""

import dataclasses
import gzip
import json
import random
import zipfile
from pathlib import Path

from moe_embed_jax.hashes import file_hash
from moe_embed_jax.preparation.builders import wheels as pinned

LANGUAGES = ("de", "fr", "ja", "ta")
_WORDS = ["sensor", "light", "window", "garden", "battery", "network", "account", "password"]


def sentence(seed: str, length: int = 8) -> str:
    """A sentence that is the same for the same seed, on every machine."""
    chooser = random.Random(seed)
    return " ".join(chooser.choice(_WORDS) for _ in range(length)) + f" {seed}"


def home_assistant_files(components: int = 40) -> dict[str, bytes]:
    files = {}
    for number in range(components):
        folder = f"homeassistant/components/c{number:03}/translations"
        for language in ("en", "en-GB", *LANGUAGES):
            if language == "ta" and number >= 3:  # a language with hardly any text
                continue
            content = {
                "title": f"{language} title {number}",
                "services": {
                    f"s{n}": {
                        "name": f"{language} service {number} {n}",
                        "description": f"{language} {sentence(f'{number}.{n}')}",
                    }
                    for n in range(5)
                },
                "common": {"shared": f"{language} the same long string in every component"},
                "untranslated": "This English text is in every language",
                "reference": "[%key:common::config_flow::something_long%]",
                "placeholder": "{placeholder_of_some_length} - {other}",
                "short": "short",
            }
            files[f"{folder}/{language}.json"] = json.dumps(content).encode()
    return files


def botocore_files(services: int = 4, operations: int = 40) -> dict[str, bytes]:
    files = {}
    for service in range(services):
        for date, marker in (("2014-01-01", "old"), ("2020-02-02", "new")):
            content = {
                "metadata": {"serviceFullName": f"Amazon Service {service}"},
                "operations": {
                    f"GetThing{n}": {
                        "documentation": f"<p>{marker} <code>Get</code>. &amp; "
                        f"{sentence(f'op {service} {n}', 12)}</p>"
                    }
                    for n in range(operations)
                },
                "shapes": {
                    "ThingRequest": {
                        "members": {
                            "maxResults": {"documentation": sentence(f"member {service}", 12)},
                            "undocumented": {"shape": "String"},
                            "empty": {"documentation": "<p></p>"},
                        }
                    }
                },
            }
            raw = json.dumps(content).encode()
            name = f"botocore/data/service{service}/{date}/service-2.json"
            if service % 2:
                files[f"{name}.gz"] = gzip.compress(raw, mtime=0)
            else:
                files[name] = raw
    return files


def google_files(apis: int = 3, fields: int = 30) -> dict[str, bytes]:
    files = {}
    for api in range(apis):
        for version in ("v1", "v2beta1", "v2"):
            content = {
                "title": f"Synthetic {api} API",
                "schemas": {
                    "ThingList": {
                        "description": f"{version} {sentence(f'schema {api}', 12)}",
                        "properties": {
                            f"field{n}": {
                                "description": f"{version} {sentence(f'field {api} {n}', 12)}"
                            }
                            for n in range(fields)
                        },
                    }
                },
                "resources": {
                    "things": {
                        "methods": {
                            "list": {
                                "description": f"{version} {sentence(f'method {api}', 12)}",
                                "parameters": {
                                    "pageSize": {"description": sentence(f"parameter {api}", 12)}
                                },
                            }
                        }
                    }
                },
            }
            path = f"googleapiclient/discovery_cache/documents/synthetic{api}.{version}.json"
            files[path] = json.dumps(content).encode()
    return files


def write_wheel(path: Path, files: dict[str, bytes]) -> None:
    """A wheel that pip accepts; equal files give equal bytes."""
    name, version = path.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in {
            **files,
            f"{info}/METADATA": metadata,
            f"{info}/WHEEL": wheel,
            f"{info}/RECORD": b"",
        }.items():
            archive.writestr(zipfile.ZipInfo(member, (2020, 1, 1, 0, 0, 0)), content)


def write_wheels(folder: Path, **changed_files: dict[str, bytes]) -> dict[str, pinned.Wheel]:
    """Writes the three wheels into `folder`; returns the table that pins them.

    `changed_files`: by module-like name (homeassistant, botocore, google), files added or replaced.
    """
    files = {
        "homeassistant": {**home_assistant_files(), **changed_files.get("homeassistant", {})},
        "botocore": {**botocore_files(), **changed_files.get("botocore", {})},
        "google-api-python-client": {**google_files(), **changed_files.get("google", {})},
    }
    folder.mkdir(parents=True, exist_ok=True)
    table = {}
    for name, wheel in pinned.WHEELS.items():
        path = folder / wheel.file_name
        write_wheel(path, files[name])
        table[name] = dataclasses.replace(wheel, sha256=file_hash(path), size=path.stat().st_size)
    return table


def pin(table: dict[str, pinned.Wheel]) -> None:
    """Puts the synthetic wheels in the place of the real ones, in this process, for good."""
    pinned.WHEELS.update(table)

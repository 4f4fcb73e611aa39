"""Checksum of edited config.json files of detectors."""

import hashlib
import json
from typing import Any


def seal(record: dict[str, Any]) -> None:
    """Replace the checksum in the content of a config.json by that of its other fields."""
    if "config_sha256" in record:
        text = json.dumps(record | {"config_sha256": ""}, sort_keys=True)
        record["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()

"""Names of an attempt's objects. Pod host names (`<name>-<index>`) are DNS labels, which sets the limits here."""

import re
from hashlib import sha256

CONTAINER = "trainer"
"""The trainer's in a pod."""
LABEL_LIMIT = 63
_BASE_LIMIT = 52
"""63 for a host name, less `-9999` for the attempt and `-511` for the index (and two to spare)."""


def base_name(job_name: str) -> str:
    """The job's name as a DNS-1035 label that leaves room for attempt and index.

    A name that has to be changed (dots, a leading digit, length) gets a hash, so that two jobs never share one.
    """
    label = re.sub(r"[^a-z0-9-]", "-", job_name)
    if not label[0].isalpha():
        label = f"j-{label}"
    if label == job_name and len(label) <= _BASE_LIMIT:
        return label
    digest = sha256(job_name.encode()).hexdigest()[:8]
    return f"{label[: _BASE_LIMIT - 9].rstrip('-')}-{digest}"


def attempt_name(job_name: str, attempt: int) -> str:
    """The name that the attempt's Job, Service and ConfigMap share."""
    return f"{base_name(job_name)}-{attempt}"


def label_value(job_name: str) -> str:
    """The job's name as a label value; only names beyond 63 characters are changed."""
    return job_name if len(job_name) <= LABEL_LIMIT else base_name(job_name)

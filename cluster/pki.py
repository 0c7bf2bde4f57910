"""Keys and certificates: one authority for Kubernetes, one for etcd, so that no cluster user can talk to etcd.

All are made at once into a new folder, which is renamed when complete: a half-made set is never used. EC keys,
because twenty RSA keys would take longer than the rest of the start.
"""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster import shell
from cluster.settings import Settings

YEARS_10 = 3650


@dataclass(frozen=True)
class Certificate:
    """A certificate to issue: `group` becomes its organisation, `names` its subject alternative names."""

    file: str
    user: str
    group: str | None = None
    names: tuple[str, ...] = ()


def ensure(settings: Settings) -> None:
    """Makes the keys, certificates and kubeconfigs unless they are there."""
    if settings.pki.exists():
        return
    folder = settings.pki.with_name("pki.new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    _authority(folder, "ca", "finetune-ca")
    _authority(folder, "etcd-ca", "finetune-etcd-ca")
    for certificate in _kubernetes_certificates(settings):
        _issue(folder, "ca", certificate)
    for certificate in (
        Certificate("etcd", "etcd", names=(f"IP:{settings.gateway}",)),
        Certificate("etcd-client", "kube-apiserver"),
    ):
        _issue(folder, "etcd-ca", certificate)
    service_account = folder / "service-account.key"
    shell.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", service_account])
    shell.run(["openssl", "ec", "-in", service_account, "-pubout", "-out", folder / "service-account.pub"])
    for user in ["admin", "controller-manager", "scheduler", "coredns", "provisioner", "kube-proxy"]:
        _kubeconfig(settings, folder, user)
    for node in settings.nodes:
        _kubeconfig(settings, folder, node.name)
    folder.rename(settings.pki)


def _kubernetes_certificates(settings: Settings) -> list[Certificate]:
    service = ["kubernetes", "default", "svc", "cluster", "local"]
    names = [f"DNS:{'.'.join(service[:n])}" for n in (1, 2, 3, 5)]
    names += [f"IP:{ip}" for ip in (settings.gateway, settings.api_service_ip, "127.0.0.1")]
    certificates = [
        Certificate("apiserver", "kube-apiserver", names=(*names, "DNS:localhost")),
        Certificate("apiserver-kubelet-client", "kube-apiserver-kubelet-client"),
        Certificate("admin", "kubernetes-admin", "system:masters"),
        Certificate("controller-manager", "system:kube-controller-manager", names=(f"IP:{settings.gateway}",)),
        Certificate("scheduler", "system:kube-scheduler", names=(f"IP:{settings.gateway}",)),
        Certificate("kube-proxy", "system:kube-proxy"),
        Certificate("coredns", "finetune:coredns"),
        Certificate("provisioner", "finetune:provisioner"),
    ]
    for node in settings.nodes:
        alternatives = (f"DNS:{node.name}", f"IP:{node.address}")
        certificates.append(Certificate(node.name, f"system:node:{node.name}", "system:nodes", alternatives))
    return certificates


def _authority(folder: Path, name: str, subject: str) -> None:
    extensions = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign,digitalSignature\n"
    _openssl_req(folder, name, f"/CN={subject}", extensions, [])


def _issue(folder: Path, authority: str, certificate: Certificate) -> None:
    subject = (f"/O={certificate.group}" if certificate.group else "") + f"/CN={certificate.user}"
    extensions = "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
    extensions += "extendedKeyUsage=clientAuth,serverAuth\n"
    if certificate.names:
        extensions += f"subjectAltName={','.join(certificate.names)}\n"
    signer = ["-CA", str(folder / f"{authority}.crt"), "-CAkey", str(folder / f"{authority}.key")]
    _openssl_req(folder, certificate.file, subject, extensions, signer)


def _openssl_req(folder: Path, name: str, subject: str, extensions: str, signer: list[str]) -> None:
    # An own configuration: the host's openssl.cnf adds CA:TRUE to everything that `req -x509` makes.
    config = f"[req]\ndistinguished_name=dn\nx509_extensions=ext\n[dn]\n[ext]\n{extensions}"
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", str(folder / f"{name}.key")]
    request = ["openssl", "req", "-x509", "-config", "/dev/stdin", "-sha256", "-days", str(YEARS_10)]
    shell.run(
        [*request, *key, "-subj", subject, *signer, "-out", str(folder / f"{name}.crt")],
        input=config,
        hint="OpenSSL 3 is needed",
    )


def _kubeconfig(settings: Settings, folder: Path, user: str) -> None:
    def encoded(file: str) -> str:
        return base64.b64encode((folder / file).read_bytes()).decode()

    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": settings.name,
                "cluster": {"server": settings.api_url, "certificate-authority-data": encoded("ca.crt")},
            }
        ],
        "users": [
            {
                "name": user,
                "user": {
                    "client-certificate-data": encoded(f"{user}.crt"),
                    "client-key-data": encoded(f"{user}.key"),
                },
            }
        ],
        "contexts": [{"name": settings.name, "context": {"cluster": settings.name, "user": user}}],
        "current-context": settings.name,
    }
    # JSON is YAML, and the standard library writes no YAML.
    path = folder / f"{user}.kubeconfig"
    path.write_text(json.dumps(config, indent=1))
    path.chmod(0o600)

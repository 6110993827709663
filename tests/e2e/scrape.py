"""A running dialogd's metrics, read as Prometheus reads them."""

import httpx
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.control import PATIENCE_S
from tests.e2e.daemon import Dialogd


class Scrape:
    """What was served at one moment."""

    def __init__(self, text: str) -> None:
        self.families: list[Metric] = list(text_string_to_metric_families(text))

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of a series' samples that have these labels, whatever others they have."""
        samples = (sample for family in self.families for sample in family.samples if sample.name == name)
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


async def scrape(dialogd: Dialogd) -> Scrape:
    """Read the metrics over the control socket."""
    transport = httpx.AsyncHTTPTransport(uds=str(dialogd.directory / "control.sock"))
    async with httpx.AsyncClient(transport=transport, base_url="http://dialogd", timeout=PATIENCE_S) as client:
        response = await client.get("/metrics")
    assert response.raise_for_status().headers["content-type"].startswith("text/plain; version=0.0.4")
    return Scrape(response.text)

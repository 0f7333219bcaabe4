"""The seed_products command: things to order in the shop."""

from typing import Any

from django.core.management.base import BaseCommand

from orders.models import Product
from orders.services import product_seed

# SKU, name, price in cents, stock.
GOODS = """
TEA-001 | Assam, loose leaf 250 g        |  1290 | 120
TEA-002 | Darjeeling, loose leaf 250 g   |  1890 |  80
TEA-003 | Sencha, loose leaf 100 g       |  1450 |  60
TEA-004 | Earl Grey, 50 bags             |   690 | 200
TEA-005 | Rooibos, loose leaf 250 g      |   990 | 150
COF-001 | Espresso beans 1 kg            |  2190 |  90
COF-002 | Filter roast beans 500 g       |  1290 | 110
COF-003 | Decaf beans 500 g              |  1390 |  40
POT-001 | Teapot, stoneware 1 l          |  3490 |  25
POT-002 | Teapot, glass 0.6 l            |  2790 |  30
POT-003 | Cast-iron kettle               |  5990 |  10
CUP-001 | Mug, blue glaze                |  1490 |  75
CUP-002 | Espresso cups, set of four     |  2890 |  35
CUP-003 | Tea bowl, hand-thrown          |  3890 |  12
MIL-001 | Hand grinder                   |  7990 |  15
MIL-002 | Electric grinder               | 14900 |   8
ACC-001 | Paper filters, 100             |   490 | 300
ACC-002 | Tea strainer, steel            |   890 | 100
ACC-003 | Kitchen scale with timer       |  4490 |  20
ACC-004 | Matcha whisk, bamboo           |  1990 |   3
"""


class Command(BaseCommand):
    """Write twenty products into an empty table."""

    help = "Writes twenty products with stock into an empty table."

    def handle(self, *args: Any, **options: Any) -> None:
        """Seed, and say what was done."""
        written = product_seed(products=[_product(line) for line in GOODS.strip().splitlines()])
        self.stdout.write(f"{written} products written." if written else "There are products already; nothing written.")


def _product(line: str) -> Product:
    sku, name, price, stock = (field.strip() for field in line.split("|"))
    return Product(sku=sku, name=name, price=int(price), currency="EUR", on_hand=int(stock))

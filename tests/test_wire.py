"Everything that the exchange was ever seen to say is understood and can be said again, and nothing else does any harm"

import json
import os
import random
import re
from pathlib import Path

import msgspec
import pytest

from hftlab.core.errors import DataError, VenueError
from hftlab.core.events import Event
from hftlab.data.answers import ANSWERS, answer
from hftlab.data.asked import asked, wanted
from hftlab.data.codes import CODES, Failure, venue_error, wait_s
from hftlab.data.messages import BookAnswer, BookTicker
from hftlab.data.private import account_events
from hftlab.data.public import rows
from hftlab.data.recordings import frames
from hftlab.data.requests import QUESTIONS, SOCKET, Request, socket_reply, socket_request
from hftlab.data.signing import Signed, payload
from hftlab.data.wire import control, decode, encode, read

ROOT = Path(__file__).parent.parent/os.environ.get('HFTLAB_SHARED_DATA', '../shared/data')
PAYLOADS = ROOT/'payloads'
seen = pytest.mark.skipif(not PAYLOADS.is_dir(), reason='needs what the exchange was seen to say')

# Of a kind that the exchange never sends: an example whose bar has a beginning and nothing else
CUT_SHORT = 'Concurrent.json'


def files(pattern: str) -> list[Path]:
    found = sorted(PAYLOADS.glob(pattern))
    assert found
    return found


def same(said, written: bytes):
    "Is it the same JSON?"
    assert json.loads(written) == said, said


@seen
def test_every_answer_is_read_and_written_again():
    of = {f: json.loads(f.read_text()) for f in files('rest/*/*.json')}
    for said in of.values():
        question, body = f'{said["method"]} {said["path"]}', json.dumps(said['response'])
        answer(question, body)
        same(said['response'], msgspec.json.encode(answer(question, body, exact=True)))
    assert len(of) == 89 and sum(f'{s["method"]} {s["path"]}' in ANSWERS for s in of.values()) == 68 # The other 21 stay plain JSON


@seen
def test_every_message_of_the_socket_api_is_read_and_written_again():
    for f in files('ws_api/*.json'):
        question = ''
        for m in json.loads(f.read_text())['messages']:
            text = json.dumps(m['message'])
            if m['direction'] == 'client_to_server':
                question = SOCKET[socket_request(text).method]
                assert question in QUESTIONS
            else:
                reply = socket_reply(text)
                same(m['message'], msgspec.json.encode(reply))
                answer(question, bytes(reply.result))
                same(m['message']['result'], msgspec.json.encode(answer(question, bytes(reply.result), exact=True)))


@seen
def test_every_message_of_a_stream_is_read_and_written_again():
    refused = []
    for f in files('ws_stream/*.json'):
        for m in json.loads(f.read_text())['messages']:
            text = json.dumps(m['message'])
            if m['direction'] == 'client_to_server':
                same(m['message'], encode(control(text)))
                continue
            try: name, message = read(text)
            except DataError: refused.append(f.name)
            else:
                same(m['message'], encode(message, name))
                for each in decoded if isinstance(decoded := decode(text, 0), list) else [decoded]: account_events(each, 0)
    assert refused == [CUT_SHORT]*2


NAUTILUS = {'account_info': 'v2/account', 'balance': 'v3/balance', 'open_algo_orders': 'v1/openAlgoOrders', 'order_response': 'v1/order',
    'position_risk': 'v2/positionRisk', 'account_orders': 'v1/allOrders', 'position_side_dual': 'v1/positionSide/dual',
    'positions_one_way': 'v2/positionRisk', 'symbol_config': 'v1/symbolConfig', 'account_trades': 'v1/userTrades', 'agg_trades': 'v1/aggTrades',
    'blvt_nav_kline': 'v1/klines', 'book_ticker': 'v1/ticker/bookTicker', 'continuous_klines': 'v1/continuousKlines', 'depth': 'v1/depth',
    'exchange_info': 'v1/exchangeInfo', 'funding_rate': 'v1/fundingRate', 'historical_trades': 'v1/historicalTrades',
    'index_price_klines': 'v1/indexPriceKlines', 'mark_price_klines': 'v1/markPriceKlines', 'market_klines': 'v1/klines', 'market_trades': 'v1/trades',
    'open_interest_hist': '/futures/data/openInterestHist', 'open_interest': 'v1/openInterest', 'premium_index': 'v1/premiumIndex',
    'taker_long_short_ratio': '/futures/data/takerlongshortRatio', 'ticker_24hr': 'v1/ticker/24hr', 'ticker_price': 'v2/ticker/price',
    'long_short': '/futures/data/globalLongShortAccountRatio', 'commission_rate': 'v1/commissionRate', 'asset_index': 'v1/assetIndex',
    'index_info': 'v1/indexInfo'}


@seen
def test_what_others_collected_is_read_and_written_again():
    streams = [f for f in files('nautilus/*/*.json') if f.parent.name in ('market_data_json', 'user_data_json', 'ws_messages')]
    for f in streams:
        said = json.loads(f.read_text())
        name, message = read(f.read_text())
        same(said, encode(message, name))
        account_events(decode(f.read_text(), 0), 0)
    answers = [f for f in files('nautilus/*/*.json') if f not in streams]
    for f in answers:
        path = next(p for k, p in NAUTILUS.items() if k in f.stem)
        question = f'GET {path if path[0] == "/" else "/fapi/" + path}'
        answer(question, f.read_bytes())
        same(json.loads(f.read_text()), msgspec.json.encode(answer(question, f.read_bytes(), exact=True)))
    assert (len(streams), len(answers)) == (29, 36)


@seen
def test_every_shape_of_a_request_is_read():
    for shape in json.loads((PAYLOADS/'rest_request_shapes.json').read_text())['requests']:
        path, _, query = shape['url'].partition('.com')[2].partition('?')
        r = asked(shape['method'], path, query, shape['body'] or '')
        assert isinstance(r, Request) and r.question in QUESTIONS
        text, signature = payload(query, shape['body'] or '')
        assert signature == '<hex>' and 'signature' not in text and text.startswith('timestamp=')
        if shape['method'] == 'POST': assert not isinstance(wanted(r.params | {'newClientOrderId': 'id'}, path.endswith('algoOrder')), Failure)


@pytest.mark.parametrize('name', ['usdm_btcusdt_20240808.gz', 'usdm_btcusdt_20230404.dat.gz', 'usdm_btcusdt_20230405.dat.gz', 'cm_btcusd_perp_20240808.gz',
    'spot_btcusdt_20240808.gz', 'usdm_multi_20210722.ws.txt.gz', 'usdm_multi_20210722.http.txt.gz'])
def test_every_recorded_message_is_read_and_written_again(name):
    if not (ROOT/'l2'/name).exists(): pytest.skip('needs the recordings')
    for seen_ns, raw in frames(ROOT/'l2'/name):
        stream, m = read(raw)
        said, again = msgspec.json.decode(raw), msgspec.json.decode(encode(m, stream))
        if isinstance(m, BookTicker) and 'e' not in said['data']: del again['data']['e'] # Spot says no name
        assert said == again
        assert isinstance(e := decode(raw, seen_ns), Event) and e.seen_ns == seen_ns or m.kind != 'MARKET'


@seen
def test_every_code_of_the_protocol_is_known():
    page = (ROOT/'../binance-usdm.md').read_text().partition('## 4. Error codes')[2].partition('## 5. ')[0]
    codes = {int(c) for row in re.findall(r'^\| (-\d[^|]*)\|', page, re.M) for c in re.findall(r'-\d{4}', row)}
    missing = codes - set(CODES)
    assert len(codes) > 100 and missing <= {-4167, -4169, -4170, -4172}, missing # Of a range in which the page gives the text of two


# What takes a decoder off its feet, put in anywhere
SPOILERS = [b'null', b'true', b'-1', b'1e999', b'"NaN"', b'"1e-400"', b'9'*30, b'[', b'{', b']', b'}', b'"', b'\\', b'\\ud800', b'\\u0000', b'\xff',
    b'[['*40, b'{"a":'*40, b'.5', b'""', b',', b':', b'0'*50, '٣'.encode(), b'"e":"trade"', b'"stream":', b'"data":[]', b'"result":null']


def spoiled(seeds: list[bytes], n: int, rng: random.Random):
    "Real frames, cut, spliced and spoiled; now and then nothing but noise"
    pick, at = rng.choice, rng.random
    for i in range(n):
        raw = pick(seeds)
        k = int(at()*len(raw))
        match i % 6:
            case 0: yield raw[:k] + pick(SPOILERS) + raw[k:]
            case 1: yield raw[:k] + pick(SPOILERS) + raw[k + int(at()*12):]
            case 2: yield raw[:k] + bytes((int(at()*256),)) + raw[k + 1:]
            case 3: yield raw[:k] + pick(seeds)[k:]
            case 4: yield raw[:k]
            case 5: yield rng.randbytes(int(at()*60)) if at() < .2 else raw[:k] + raw[k + 1 + int(at()*20):]


def seeds(*patterns: str) -> list[bytes]:
    found = [m['message'] for p in patterns for f in sorted(PAYLOADS.glob(p)) for m in json.loads(f.read_text()).get('messages', [])]
    return [json.dumps(m, separators=(',', ':')).encode() for m in found] or [b'{"stream":"x@trade","data":{"e":"trade","E":1,"T":1,"s":"X","t":1,"p":"1","q":"1","m":true}}']


def test_a_million_frames_that_nobody_sent():
    "A message or a DataError of one line: nothing else comes out, and what comes out is whole"
    rng, frames_of_streams = random.Random(4), seeds('ws_stream/*.json')
    messages = 0
    for i, raw in enumerate(spoiled(frames_of_streams, 1_000_000, rng)):
        try: m = decode(raw, i)
        except DataError as e: assert '\n' not in e.args[0]
        else:
            messages += 1
            account_events(m, i)
        if i % 5: continue
        try: name, m = read(raw)
        except DataError: continue
        assert read(encode(m, name)) == (name, m) # Whole: it survives being written
    assert messages > 50_000 # Enough of them were only scratched to be worth the name


def test_answers_and_questions_that_nobody_sent():
    rng, said = random.Random(5), seeds('ws_api/*.json')
    answers = [msgspec.json.encode(r.get('result')) for r in map(json.loads, said) if 'result' in r] or [b'[]']
    known = list(ANSWERS)
    for i, raw in enumerate(spoiled(said + answers, 50_000, rng)):
        for reads in (socket_request, socket_reply, control, lambda b, i=i: answer(known[i % len(known)], b), lambda b: rows('bars', b)):
            try: reads(raw)
            except DataError as e: assert '\n' not in e.args[0]
        text = raw.decode('latin1')
        assert isinstance(asked('POST', '/fapi/v1/order', text), Request | Failure) and isinstance(payload(text), Signed)
        assert isinstance(venue_error(400 + i % 200, raw), VenueError) and wait_s(raw) >= 0


def test_a_book_is_not_taken_for_another():
    "What came under the name of a stream bears its symbol, what stands bare that of its caller"
    bare = b'{"lastUpdateId":9,"bids":[["1.0","2"]],"asks":[]}'
    assert isinstance(read(bare).message, BookAnswer)
    assert decode(bare, 1, 'ADAUSDT').symbol == 'ADAUSDT' and decode(b'{"stream":"ethusdt@depth","data":%b}' % bare, 1).symbol == 'ETHUSDT'
    with pytest.raises(DataError, match='known to send'): decode(b'{"stream":"ethusdt@depth","data":{"lastUpdateId":9}}', 1)

# SPDX-License-Identifier: Apache-2.0
"""Threads and eventlet: what blocks goes elsewhere, and others go on."""

import os
import subprocess
import sys
import tempfile
import threading
import unittest

from volume import concurrency

START = """
import contextvars, logging, sys, threading, time
from volume import concurrency
concurrency.start('eventlet')
from volume.node import Node
native = concurrency.native()
"""
MANAGER = """
with open('{root}/volume.conf', 'w') as f:
    f.write('[DEFAULT]\\nlease_s = 1\\nhost = h\\nroles = manager\\n')
    f.write('state_path = {root}/s\\n')
from volume import conf, service
started = service.Service(conf.load([], ['{root}/volume.conf']))
started.start()
"""


def run(script, *words):
    """Run a script in a process of its own; return how it ended."""
    return subprocess.run(
        [sys.executable, '-c', script, *words],
        capture_output=True, text=True, timeout=60,
    )


class Threads(unittest.TestCase):
    @unittest.skipIf(concurrency.is_green(), 'these tests run in greenthreads')
    def test_what_blocks_is_a_plain_call(self):
        found = concurrency.blocking(threading.current_thread)
        self.assertIs(threading.current_thread(), found)

    def test_eventlet_is_refused_once_it_is_too_late(self):
        done = run(
            'from volume import concurrency as c; c.check("threads")\n'
            'from volume import errors\n'
            'try:\n    c.check("eventlet")\n'
            'except errors.Invalid as refused:\n    print(refused)\n'
        )
        self.assertIn('volume-service', done.stdout, done.stderr)



class Eventlet(unittest.TestCase):
    def says(self, script):
        done = run(START + script)
        self.assertEqual('', done.stderr)
        self.assertEqual(0, done.returncode)
        return done.stdout

    def manager_says(self, script):
        with tempfile.TemporaryDirectory() as root:
            return self.says(MANAGER.format(root=root) + script)

    def test_others_go_on_while_a_call_blocks(self):
        # The call ends only if a greenthread runs meanwhile.
        self.assertEqual('True\n', self.says("""
ran = native.Event()
threading.Thread(target=ran.set).start()
print(Node('/').blocking(lambda: ran.wait(30)))
"""))

    def test_a_call_inherits_the_context_of_its_caller(self):
        self.assertEqual('locks\n', self.says("""
held = contextvars.ContextVar('held', default='none')
def work():
    held.set('locks')
    print(concurrency.blocking(held.get))
thread = threading.Thread(target=work)
thread.start()
thread.join()
assert held.get() == 'none'
"""))

    def test_whatever_is_raised_comes_back(self):
        self.assertEqual('died\n', self.says("""
class Died(BaseException): pass
def die(): raise Died('died')
try:
    concurrency.blocking(die)
except Died as died:
    print(died)
"""))

    def test_a_native_thread_that_would_wait_for_green_ones_fails(self):
        self.assertIn('take that out of blocking()', self.says("""
for wait in lambda: time.sleep(1), threading.Event().wait:
    try:
        concurrency.blocking(wait)
    except RuntimeError as refused:
        print(refused)
    else:
        print('it waited')
"""))

    def test_a_lane_that_is_stuck_holds_no_other(self):
        self.assertEqual('first\nsecond\n', self.says("""
slow, ended = concurrency.Lane('slow', 1), native.Event()
stuck = [
    threading.Thread(target=slow.run, args=[lambda: ended.wait(30)])
    for _ in range(3)
]
for each in stuck:
    each.start()
print(concurrency.blocking(lambda: 'first'))
ended.set()
for each in stuck:
    each.join()
print(slow.run(lambda: 'second'))
"""))

    def test_a_lane_without_a_thread_waits_for_none(self):
        self.assertEqual('refused\nlater\n', self.says("""
lane = concurrency.Lane('scarce', 1)
native.stack_size(1 << 46)  # more than there is: no thread can be begun
try:
    lane.run(lambda: 'at once')
except RuntimeError:
    print('refused')
native.stack_size(0)
print(lane.run(lambda: 'later'))
"""))

    def test_both_kinds_of_threads_can_log(self):
        # The lock of a handler is taken in the one while the other waits.
        self.assertEqual('400\n', self.says("""
count = 0
class Counter(logging.Handler):
    def emit(self, record):
        global count
        count += 1
logging.getLogger().addHandler(Counter())
def log():
    for number in range(100):
        logging.warning('%s', number)
threads = [
    threading.Thread(target=work)
    for work in (log, lambda: concurrency.blocking(log)) * 2
]
for each in threads:
    each.start()
for each in threads:
    each.join()
print(count)
"""))

    def test_sqlite_serves_many_greenthreads_at_once(self):
        with tempfile.TemporaryDirectory() as root:
            self.assertEqual('250 True\n', self.says(f"""
import sqlalchemy
from volume.db.engine import Database
db = Database('sqlite:///{root}/db')
db.write(lambda s: s.execute(sqlalchemy.text('CREATE TABLE t (n INT)')))
before = native.get_ident()
inside = set()
def work():
    for number in range(10):
        def put(session):
            inside.add(native.get_ident())
            session.execute(sqlalchemy.text('INSERT INTO t VALUES (1)'))
        db.write(put)
        db.read(lambda s: s.scalar(sqlalchemy.text('SELECT 1')))
threads = [threading.Thread(target=work) for _ in range(25)]
for each in threads:
    each.start()
for each in threads:
    each.join()
count = db.read(lambda s: s.scalar(sqlalchemy.text('SELECT sum(n) FROM t')))
print(count, before not in inside)
"""))

    def test_sqlite_s_threads_touch_no_lock_of_eventlet_s(self):
        # Two that met at one would fail, once in a thousand times.
        with tempfile.TemporaryDirectory() as root:
            self.assertEqual('set()\n', self.says(f"""
import sys
from eventlet import semaphore
touched, acquire = set(), semaphore.Semaphore.acquire
def watched(lock, *words, **options):
    frame = sys._getframe(1)
    if 'eventlet' in frame.f_code.co_filename:
        frame = frame.f_back
    if native.current_thread().name.startswith('sqlite') and not first:
        touched.add((frame.f_code.co_filename, frame.f_lineno))
    return acquire(lock, *words, **options)
semaphore.Semaphore.acquire = watched
semaphore.Semaphore.__enter__ = lambda lock: watched(lock) and None
from volume.db import models
from volume.db.engine import Database
first = [True]  # alone, with a native lock around it
db = Database('sqlite:///{root}/db')
db.read(lambda session: None)
first.clear()
db.write(lambda session: models.Base.metadata.create_all(session.connection()))
def put(session):
    session.add(
        models.Service(host='h', owner='o', started_at=0, heard_at=0)
    )
def look(session):
    return [each.host for each in session.query(models.Service)]
db.write(put)
db.read(look)
print(touched)
"""))

    def test_reads_digests_and_transactions_stop_nobody(self):
        # Each ends only if a greenthread runs meanwhile, who writes into the
        # pipe or sets the event.
        with tempfile.TemporaryDirectory() as root:
            self.assertEqual('more more True True\n', self.says(f"""
import os
from volume.db.engine import Database
from volume.node import Reading
from volume.transfer import copy
os.mkfifo('{root}/pipe')
pipe = os.open('{root}/pipe', os.O_RDWR)
def later(effect):
    threading.Thread(target=effect).start()
read = bytearray(4)
later(lambda: os.writev(pipe, [b'more']))
Node('{root}').open('{root}/pipe').readinto(read)
image = bytearray(4)
later(lambda: os.writev(pipe, [b'more']))
Reading('{root}/pipe').readinto(image)
class Digest:
    def update(self, data):
        self.ran = ran.wait(30)
digest, ran = Digest(), native.Event()
later(ran.set)
copy._hash(digest, copy._Chunk(0, 4, image))
ran = native.Event()
later(ran.set)
print(
    read.decode(), image.decode(), digest.ran,
    Database('sqlite:///{root}/db').write(lambda session: ran.wait(30)),
)
"""))

    def test_the_heart_beats_while_greenthreads_are_stuck(self):
        self.assertEqual('True\n', self.manager_says("""
import sqlite3
beaten, tick = native.Event(), native.Event()
def watch():
    database = sqlite3.connect(
        f'{started.node.state_dir}/volume.sqlite', timeout=30)
    def heard():
        return database.execute('SELECT heard_at FROM services').fetchall()
    before = heard()
    while heard() == before:
        tick.wait(0.02)
    beaten.set()
native.Thread(target=watch, daemon=True).start()
print(beaten.wait(30))  # in the thread of the greenthreads: nobody else runs
started.stop()
"""))

    def test_heartbeat_and_leases_wait_for_one_another(self):
        # At their database, in native threads; no greenthread runs.
        self.assertEqual('True\n', self.manager_says("""
database = started._pulse_db
inside, leave, beaten = native.Event(), native.Event(), native.Event()
def renew(session):
    inside.set()
    leave.wait(30)
def beat():
    started._beat()
    beaten.set()
native.Thread(target=lambda: database.write(renew), daemon=True).start()
inside.wait(30)
native.Thread(target=beat, daemon=True).start()
while not database._writing._waiting:
    beaten.wait(0.02)
leave.set()
print(beaten.wait(30))
started.stop()
"""))


class Launch(unittest.TestCase):
    def launch(self, text, *words, hidden=''):
        """Start the service's command on a configuration that is refused."""
        with tempfile.TemporaryDirectory() as root:
            path = os.path.join(root, 'volume.conf')
            with open(path, 'w') as f:
                f.write(f'[DEFAULT]\nstate_path = {root}/s\n{text}\n')
                f.write('[api]\nlisten = 0.0.0.0\n')
            return run(
                f'import sys; {hidden}\n'
                'from volume import concurrency, launch\n'
                'code = launch.main(sys.argv[1:])\n'
                'print(concurrency.is_green()); sys.exit(code)',
                '--config-file', path, *words,
            )

    def test_the_file_says_the_mode(self):
        for mode, is_green in ('threads', False), ('eventlet', True):
            done = self.launch(f'concurrency = {mode}')
            self.assertEqual(f'{is_green}\n', done.stdout, done.stderr)
            self.assertIn('0.0.0.0', done.stderr)

    def test_the_command_line_says_the_mode(self):
        done = self.launch('', '--concurrency', 'eventlet')
        self.assertEqual('True\n', done.stdout, done.stderr)

    def test_eventlet_that_is_not_installed_is_a_clear_error(self):
        done = self.launch(
            'concurrency = eventlet', hidden='sys.modules["eventlet"] = None'
        )
        self.assertEqual((1, 'False\n'), (done.returncode, done.stdout))
        self.assertIn('volume-service[eventlet]', done.stderr)
        self.assertNotIn('Traceback', done.stderr)

    def test_another_word_is_refused_with_those_that_are_known(self):
        done = self.launch('concurrency = fibres')
        self.assertEqual(1, done.returncode)
        self.assertIn('eventlet', done.stderr)
        self.assertNotIn('Traceback', done.stderr)

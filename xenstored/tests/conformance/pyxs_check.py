"""Conformance of a xenstore daemon, as PyPI's pyxs sees it. Usage: pyxs_check.py SOCKET

It asks for nothing of ours: any xenstored that serves SOCKET can be checked with it. Works below /conformance-py alone.
"""

import errno
import sys
import threading

import pyxs
from pyxs import Client, PyXSError

TOP = b"/conformance-py"
socket_path = sys.argv[1]
checks = 0


def check(what, condition):
    global checks
    checks += 1
    if not condition:
        sys.exit("FAILED: %s" % what)


def refused(what, error, call, *args):
    try:
        call(*args)
    except PyXSError as e:
        check("%s: %r" % (what, e), e.args[0] == error)
    else:
        check(what + " was not refused", False)


def client():
    return Client(unix_socket_path=socket_path)


def nodes():
    with client() as c:
        if c.exists(TOP):
            c.delete(TOP)
        c.write(TOP + b"/a", b"value")
        check("read", c.read(TOP + b"/a") == b"value")
        check("item", c[TOP + b"/a"] == b"value")
        check("default", c.read(TOP + b"/none", b"default") == b"default")
        check("exists", c.exists(TOP) and not c.exists(TOP + b"/none"))
        refused("read of nothing", errno.ENOENT, lambda: c.read(TOP + b"/none"))
        # pyxs itself refuses to send anything but NUL and printable ASCII.
        everything = bytes([0, *range(0x20, 0x7F)]) * 20
        c.write(TOP + b"/binary", everything)
        check("binary", c.read(TOP + b"/binary") == everything)
        c.mkdir(TOP + b"/made/on/the/way")
        check("mkdir", c.read(TOP + b"/made/on/the/way") == b"" and c.list(TOP + b"/made/on") == [b"the"])
        c.mkdir(TOP + b"/a")
        check("mkdir of what is there", c.read(TOP + b"/a") == b"value")
        check("list", sorted(c.list(TOP)) == [b"a", b"binary", b"made"])
        check("no children", c.list(TOP + b"/a") == [])
        walked = [path for path, _, _ in c.walk(TOP)]
        check("walk", set(walked) >= {TOP, TOP + b"/a", TOP + b"/made/on/the/way"})
        c.delete(TOP + b"/made/on")
        check("delete", not c.exists(TOP + b"/made/on/the/way") and c.exists(TOP + b"/made"))


def permissions():
    with client() as c:
        c.set_perms(TOP + b"/a", [b"b0", b"r1", b"w2", b"n3"])
        check("perms", c.get_perms(TOP + b"/a") == [b"b0", b"r1", b"w2", b"n3"])
        check("domain path", c.get_domain_path(7) == b"/local/domain/7")
        check("introduced", c.is_domain_introduced(31999) is False)


def transactions():
    with client() as one, client() as other:
        one.transaction()
        one.write(TOP + b"/t", b"inside")
        check("not seen outside", not other.exists(TOP + b"/t"))
        check("seen inside", one.read(TOP + b"/t") == b"inside")
        one.commit()
        check("seen after the commit", other.read(TOP + b"/t") == b"inside")
        one.transaction()
        one.delete(TOP + b"/t")
        one.rollback()
        check("rolled back", other.read(TOP + b"/t") == b"inside")
        # A read that is no longer true: the commit must be refused, and nothing of it be seen.
        one.transaction()
        old = one.read(TOP + b"/t")
        other.write(TOP + b"/t", b"changed")
        one.write(TOP + b"/u", old)
        check("conflict", one.commit() is False)
        check("nothing of it", other.read(TOP + b"/t") == b"changed" and not other.exists(TOP + b"/u"))


def watches():
    with client() as c, client() as writer:
        monitor = c.monitor()
        monitor.watch(TOP + b"/w", b"token")
        event = next(monitor.wait())
        check("the event at registration", (event.path, event.token) == (TOP + b"/w", b"token"))
        threading.Timer(0.05, lambda: writer.write(TOP + b"/w/below", b"1")).start()
        event = next(monitor.wait())
        check("an event", (event.path, event.token) == (TOP + b"/w/below", b"token"))
        monitor.unwatch(TOP + b"/w", b"token")
        writer.write(TOP + b"/w/below", b"2")
        check("unwatched", writer.read(TOP + b"/w/below") == b"2")


nodes()
permissions()
transactions()
watches()
with client() as c:
    c.delete(TOP)
    check("gone", not c.exists(TOP))
print("pyxs %s: %d checks, 0 failed" % (getattr(pyxs, "__version__", ""), checks))

//! The outside's end of TCP: a kernel socket that takes or gives as fast as it can.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::endpoint::Direction;

/// Bytes of each read and write.
const CHUNK: usize = 256 << 10;
/// A peer that does nothing for so long is gone.
const GONE: Duration = Duration::from_secs(20);

/// Serves on `address` from the calling thread's network namespace, on threads of its own; gives the port. Lasts until the process
/// ends.
///
/// # Errors
/// Those of the socket.
pub fn start(address: Ipv4Addr) -> Result<u16> {
    let listener = TcpListener::bind((address, 0))?;
    let port = listener.local_addr()?.port();
    std::thread::Builder::new().name("sink".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            // An endpoint ends a measurement by resetting its connection.
            std::thread::spawn(move || drop(serve(stream)));
        }
    })?;
    Ok(port)
}

fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(GONE))?;
    stream.set_write_timeout(Some(GONE))?;
    let mut way = [0];
    stream.read_exact(&mut way)?;
    let mut chunk = vec![0x24; CHUNK];
    loop {
        if way[0] == Direction::In as u8 {
            stream.write_all(&chunk)?;
        } else if stream.read(&mut chunk)? == 0 {
            return Ok(());
        }
    }
}

/// The kernel's own TCP against a sink: MiB a second for about `time`.
///
/// # Errors
/// Those of the socket.
pub fn stream(address: Ipv4Addr, port: u16, way: Direction, time: Duration) -> Result<f64> {
    let mut stream = TcpStream::connect((address, port))?;
    stream.set_read_timeout(Some(GONE))?;
    stream.set_write_timeout(Some(GONE))?;
    stream.write_all(&[way as u8])?;
    let mut chunk = vec![0x42; CHUNK];
    let mut moved = 0;
    let start = Instant::now();
    while start.elapsed() < time {
        moved += match way {
            Direction::Out => stream.write(&chunk)?,
            Direction::In => stream.read(&mut chunk)?,
        };
    }
    Ok(moved as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64())
}

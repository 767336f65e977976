//! A small RFB client (RFC 6143, what VNC speaks): takes one picture of a display.
//!
//! What the server says is an allegation: sizes are bounded, rectangles must lie in the picture, and everything has one deadline.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// Largest picture, pixels.
pub const MAX_PIXELS: usize = 16 << 20;
/// Longest name of a display, bytes.
const MAX_NAME: u32 = 4096;
/// How long a change that is already under way may take to be told.
const SETTLE: Duration = Duration::from_millis(150);
/// Encodings (7.7, 7.8.2).
const RAW: i32 = 0;
const DESKTOP_SIZE: i32 = -223;

/// Why there is no picture.
#[derive(Debug, thiserror::Error)]
pub enum RfbError {
    /// The display's server hung up, or the like.
    #[error("the display's server: {0}")]
    Io(#[from] std::io::Error),
    /// It takes too long.
    #[error("the display's server does not answer in time")]
    Late,
    /// It wants a password, or refuses.
    #[error("the display's server refuses the session")]
    Refused,
    /// It says what is not RFB.
    #[error("the display's server answers garbage: {0}")]
    Garbage(&'static str),
}

/// What a display shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Pixels in a row.
    pub width: u16,
    /// Rows.
    pub height: u16,
    /// Red, green and blue of each pixel, row by row.
    pub rgb: Vec<u8>,
}

impl Picture {
    fn blank(width: u16, height: u16) -> Result<Picture, RfbError> {
        let pixels = usize::from(width) * usize::from(height);
        if pixels == 0 || pixels > MAX_PIXELS {
            return Err(RfbError::Garbage("a display of an impossible size"));
        }
        Ok(Picture { width, height, rgb: vec![0; pixels * 3] })
    }

    /// The picture as a PNG file.
    ///
    /// # Errors
    /// None that a picture with as many bytes as its size says can have.
    pub fn png(&self) -> Result<Vec<u8>, png::EncodingError> {
        let mut out = Vec::new();
        let mut encoder = png::Encoder::new(&mut out, self.width.into(), self.height.into());
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.rgb)?;
        writer.finish()?;
        Ok(out)
    }
}

struct Session {
    stream: UnixStream,
    deadline: Instant,
    picture: Picture,
}

/// Fails once the deadline has passed.
fn left(deadline: Instant) -> Result<Duration, RfbError> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(RfbError::Late),
        left => Ok(left),
    }
}

fn late(e: std::io::Error) -> RfbError {
    match e.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => RfbError::Late,
        _ => RfbError::Io(e),
    }
}

fn read(stream: &mut UnixStream, deadline: Instant, mut into: &mut [u8]) -> Result<(), RfbError> {
    while !into.is_empty() {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(into) {
            Ok(0) => return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
            Ok(n) => into = &mut into[n..],
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(late(e)),
        }
    }
    Ok(())
}

fn take<const N: usize>(stream: &mut UnixStream, deadline: Instant) -> Result<[u8; N], RfbError> {
    let mut bytes = [0; N];
    read(stream, deadline, &mut bytes)?;
    Ok(bytes)
}

fn say(stream: &mut UnixStream, deadline: Instant, bytes: &[u8]) -> Result<(), RfbError> {
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream.write_all(bytes).map_err(late)
}

/// Begins a session without a password (7.1 to 7.3): the display's width and height.
///
/// # Errors
/// [`RfbError`].
pub fn begin(stream: &mut UnixStream, deadline: Instant) -> Result<(u16, u16), RfbError> {
    let version = take::<12>(stream, deadline)?;
    if !version.starts_with(b"RFB 003.") {
        return Err(RfbError::Garbage("no RFB"));
    }
    say(stream, deadline, b"RFB 003.008\n")?;
    let [count] = take(stream, deadline)?;
    let mut kinds = vec![0; count.into()];
    read(stream, deadline, &mut kinds)?;
    // 1 is None.
    if !kinds.contains(&1) {
        return Err(RfbError::Refused);
    }
    say(stream, deadline, &[1])?;
    if take::<4>(stream, deadline)? != [0; 4] {
        return Err(RfbError::Refused);
    }
    // Others may look, too.
    say(stream, deadline, &[1])?;
    let [w1, w2, h1, h2, ..] = take::<20>(stream, deadline)?;
    let name = u32::from_be_bytes(take(stream, deadline)?);
    if name > MAX_NAME {
        return Err(RfbError::Garbage("a display of an endless name"));
    }
    read(stream, deadline, &mut vec![0; name as usize])?;
    Ok((u16::from_be_bytes([w1, w2]), u16::from_be_bytes([h1, h2])))
}

/// Presses a key or releases it; `key` as X11 numbers it (7.5.4).
///
/// # Errors
/// [`RfbError`].
pub fn press(stream: &mut UnixStream, key: u32, down: bool, patience: Duration) -> Result<(), RfbError> {
    let mut message = [4, down.into(), 0, 0, 0, 0, 0, 0];
    message[4..].copy_from_slice(&key.to_be_bytes());
    say(stream, Instant::now() + patience, &message)
}

/// What the display at the other end shows.
///
/// # Errors
/// [`RfbError`].
pub fn picture(mut stream: UnixStream, patience: Duration) -> Result<Picture, RfbError> {
    let deadline = Instant::now() + patience;
    let (width, height) = begin(&mut stream, deadline)?;
    let mut session = Session { picture: Picture::blank(width, height)?, stream, deadline };
    session.say(&[
        // SetPixelFormat (7.5.1): 32 bits, little endian, red at 16, green at 8, blue at 0.
        0, 0, 0, 0, 32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0,
    ])?;
    let mut encodings = vec![2, 0, 0, 2];
    for encoding in [RAW, DESKTOP_SIZE] {
        encodings.extend(encoding.to_be_bytes());
    }
    session.say(&encodings)?;
    session.ask(false)?;
    // All of it, again if its size changes meanwhile.
    while session.update()? {
        session.ask(false)?;
    }
    // The server may have had an old one at hand; what it draws now comes at once.
    session.ask(true)?;
    let end = session.deadline;
    session.deadline = end.min(Instant::now() + SETTLE);
    match session.update() {
        Ok(true) => {
            session.deadline = end;
            session.ask(false)?;
            while session.update()? {
                session.ask(false)?;
            }
        }
        // Half of a change is as good as none.
        Ok(false) | Err(RfbError::Late) => {}
        Err(e) => return Err(e),
    }
    Ok(session.picture)
}

impl Session {
    fn say(&mut self, bytes: &[u8]) -> Result<(), RfbError> {
        say(&mut self.stream, self.deadline, bytes)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], RfbError> {
        take(&mut self.stream, self.deadline)
    }

    /// FramebufferUpdateRequest (7.5.3): all of the picture, or what changes.
    fn ask(&mut self, changes: bool) -> Result<(), RfbError> {
        let (w, h) = (self.picture.width.to_be_bytes(), self.picture.height.to_be_bytes());
        self.say(&[3, changes.into(), 0, 0, 0, 0, w[0], w[1], h[0], h[1]])
    }

    /// Takes messages until a FramebufferUpdate (7.6.1) was taken; true if the picture has another size now and is blank.
    fn update(&mut self) -> Result<bool, RfbError> {
        loop {
            match self.take::<1>()? {
                [0] => {}
                // Bell.
                [2] => continue,
                // Cut text, of which this end has no use: its length is QEMU's word.
                [3] => {
                    let [_, _, _, length @ ..] = self.take::<7>()?;
                    let mut rest = u64::from(u32::from_be_bytes(length));
                    let mut sink = [0; 4096];
                    while rest > 0 {
                        let n = rest.min(sink.len() as u64) as usize;
                        read(&mut self.stream, self.deadline, &mut sink[..n])?;
                        rest -= n as u64;
                    }
                    continue;
                }
                _ => return Err(RfbError::Garbage("a message that nobody asked for")),
            }
            let [_, count @ ..] = self.take::<3>()?;
            let mut resized = false;
            for _ in 0..u16::from_be_bytes(count) {
                resized |= self.rectangle()?;
            }
            return Ok(resized);
        }
    }

    fn rectangle(&mut self) -> Result<bool, RfbError> {
        let header = self.take::<12>()?;
        let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let (x, y, w, h) = (word(0), word(2), word(4), word(6));
        match i32::from_be_bytes([header[8], header[9], header[10], header[11]]) {
            DESKTOP_SIZE => {
                self.picture = Picture::blank(w, h)?;
                Ok(true)
            }
            RAW => {
                let picture = &mut self.picture;
                let wide = usize::from(picture.width);
                let inside = usize::from(x) + usize::from(w) <= wide
                    && usize::from(y) + usize::from(h) <= usize::from(picture.height);
                if !inside {
                    return Err(RfbError::Garbage("pixels beside the display"));
                }
                let mut row = vec![0; usize::from(w) * 4];
                for line in usize::from(y)..usize::from(y) + usize::from(h) {
                    read(&mut self.stream, self.deadline, &mut row)?;
                    let at = (line * wide + usize::from(x)) * 3;
                    let into = &mut picture.rgb[at..at + usize::from(w) * 3];
                    for (to, from) in into.chunks_exact_mut(3).zip(row.chunks_exact(4)) {
                        to.copy_from_slice(&[from[2], from[1], from[0]]);
                    }
                }
                Ok(false)
            }
            _ => Err(RfbError::Garbage("an encoding that nobody asked for")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    /// Plays a server: what it says goes out at once, and what it is told is taken.
    fn server(says: Vec<u8>, stays: bool) -> UnixStream {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut reader = theirs.try_clone().unwrap();
            let taker = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
            if theirs.write_all(&says).is_ok() && stays {
                let _ended = taker.join();
            }
        });
        ours
    }

    fn hello(width: u16, height: u16) -> Vec<u8> {
        let mut out = b"RFB 003.008\n\x01\x01\0\0\0\0".to_vec();
        out.extend([width.to_be_bytes(), height.to_be_bytes()].concat());
        out.extend([0; 16]);
        out.extend(b"\0\0\0\x04QEMU");
        out
    }

    fn rectangle(x: u16, y: u16, w: u16, h: u16, encoding: i32, pixels: &[u8]) -> Vec<u8> {
        let mut out: Vec<u8> = [x, y, w, h].iter().flat_map(|n| n.to_be_bytes()).collect();
        out.extend(encoding.to_be_bytes());
        out.extend(pixels);
        out
    }

    fn update(rectangles: &[Vec<u8>]) -> Vec<u8> {
        let mut out = vec![0, 0];
        out.extend((rectangles.len() as u16).to_be_bytes());
        out.extend(rectangles.concat());
        out
    }

    #[test]
    fn a_picture_comes_in_pieces_and_in_another_size() {
        let mut says = hello(1, 1);
        says.push(2);
        says.extend(b"\x03\0\0\0\0\0\0\x02ab");
        says.extend(update(&[rectangle(0, 0, 2, 2, DESKTOP_SIZE, &[])]));
        let top = rectangle(0, 0, 2, 1, RAW, &[1, 2, 3, 0, 4, 5, 6, 0]);
        let left = rectangle(0, 1, 1, 1, RAW, &[7, 8, 9, 0]);
        says.extend(update(&[top, left]));
        let seen = picture(server(says, true), SOON).unwrap();
        assert_eq!((seen.width, seen.height), (2, 2));
        assert_eq!(seen.rgb, [3, 2, 1, 6, 5, 4, 9, 8, 7, 0, 0, 0]);
        let file = seen.png().unwrap();
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        assert_eq!(pixels, seen.rgb);
    }

    #[test]
    fn what_no_display_says_is_refused() {
        let with = |more: &[u8]| [hello(4, 4), more.to_vec()].concat();
        for (says, want) in [
            (b"HTTP/1.1 400".to_vec(), "no RFB"),
            (b"RFB 003.008\n\x01\x02".to_vec(), "refuses"),
            (b"RFB 003.008\n\x00".to_vec(), "refuses"),
            (b"RFB 003.008\n\x01\x01\0\0\0\x01".to_vec(), "refuses"),
            (hello(0, 4), "impossible"),
            (hello(65535, 65535), "impossible"),
            ([&hello(4, 4)[..38], &[255; 4]].concat(), "endless"),
            (with(&[9]), "nobody asked"),
            (with(&update(&[rectangle(3, 0, 2, 1, RAW, &[0; 8])])), "beside"),
            (with(&update(&[rectangle(0, 65535, 1, 65535, RAW, &[])])), "beside"),
            (with(&update(&[rectangle(0, 0, 4, 4, 16, &[])])), "encoding"),
            (with(&update(&[rectangle(0, 0, 65535, 65535, DESKTOP_SIZE, &[])])), "impossible"),
            (with(&[]), "server"),
        ] {
            let error = picture(server(says, false), SOON).unwrap_err().to_string();
            assert!(error.contains(want), "{want}: {error}");
        }
    }

    #[test]
    fn a_silent_display_is_given_up() {
        let began = Instant::now();
        let short = Duration::from_millis(100);
        for says in [Vec::new(), hello(4, 4), [hello(4, 4), b"\x03\0\0\0\xff\xff\xff\xff".to_vec()].concat()]
        {
            assert!(matches!(picture(server(says, true), short), Err(RfbError::Late)));
        }
        assert!(began.elapsed() < SOON);
    }
}

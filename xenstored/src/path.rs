//! Paths (docs/misc/xenstore.txt): alphanumerics and `-/_@`, absolute or relative to `/local/domain/<domid>`.
#![forbid(unsafe_code)]

use std::borrow::Cow;

use xen_abi::xs_wire::XENSTORE_ABS_PATH_MAX;

use crate::wire::Errno;

/// `@introduceDomain`, as a node name.
pub const INTRODUCE: &[u8] = b"@introduceDomain";
/// `@releaseDomain`, as a node name.
pub const RELEASE: &[u8] = b"@releaseDomain";

/// Makes an absolute path of what a client sent.
///
/// `base` is put before a relative path (`/local/domain/<domid>`; empty for socket clients, as in Xen's
/// daemon). The limit is checked after that (XSA-323). `path_max` limits what comes after
/// `/local/domain/<domid>/`, so that dom0 can address whatever a guest could make.
///
/// # Errors
/// EINVAL for anything that is not a valid path.
pub fn canonicalize<'a>(
    raw: &'a [u8],
    base: &[u8],
    special_ok: bool,
    path_max: usize,
) -> Result<Cow<'a, [u8]>, Errno> {
    let valid = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'/' | b'_' | b'@');
    if !raw.iter().all(valid) {
        return Err(Errno::EINVAL);
    }
    let path = match raw.first() {
        Some(b'@') if special_ok => Cow::Borrowed(raw),
        Some(b'@') => return Err(Errno::EINVAL),
        Some(b'/') => Cow::Borrowed(raw),
        _ => Cow::Owned([base, b"/", raw].concat()),
    };
    let trailing = path.len() > 1 && path.ends_with(b"/");
    let doubled = path.windows(2).any(|w| w == b"//");
    let long = path.len() > XENSTORE_ABS_PATH_MAX as usize || path.len() - domain_prefix(&path) > path_max;
    if trailing || doubled || long || path.is_empty() {
        return Err(Errno::EINVAL);
    }
    Ok(path)
}

/// Bytes of a leading `/local/domain/<number>/`, 0 if there is none.
fn domain_prefix(path: &[u8]) -> usize {
    const LOCAL: &[u8] = b"/local/domain/";
    let Some(rest) = path.strip_prefix(LOCAL) else { return 0 };
    let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    if (1..=5).contains(&digits) && rest.get(digits) == Some(&b'/') { LOCAL.len() + digits + 1 } else { 0 }
}

/// The names on the way from the hidden root to `path`. The tree's `/` is the hidden root's child `""`, and
/// the special nodes are its children under their own names.
pub fn names(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let path = if path == b"/" { b"" } else { path };
    path.split(|b| *b == b'/')
}

/// The parent's path; `None` for `/` and for special nodes.
pub fn parent(path: &[u8]) -> Option<&[u8]> {
    if path == b"/" || !path.starts_with(b"/") {
        return None;
    }
    match path.iter().rposition(|b| *b == b'/') {
        Some(0) => Some(b"/"),
        Some(at) => Some(&path[..at]),
        None => None,
    }
}

/// `path` and all its ancestors, from the root down. A special path has only itself.
pub fn prefixes(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let absolute = path.starts_with(b"/");
    let root = (absolute && path.len() > 1).then_some(&path[..1]);
    let inner = (1..path.len()).filter(move |i| absolute && path[*i] == b'/').map(|i| &path[..i]);
    root.into_iter().chain(inner).chain(std::iter::once(path))
}

/// Path of `name` below `dir`.
pub fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir == b"/" { [b"/", name].concat() } else { [dir, b"/", name].concat() }
}

/// `/local/domain/<domid>`.
pub fn domain_path(domid: u16) -> Vec<u8> {
    format!("/local/domain/{domid}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical() {
        let ok = |p: &[u8]| canonicalize(p, b"/local/domain/3", true, 2048).map(Cow::into_owned);
        assert_eq!(ok(b"/"), Ok(b"/".to_vec()));
        assert_eq!(ok(b"a/b"), Ok(b"/local/domain/3/a/b".to_vec()));
        assert_eq!(ok(b"@releaseDomain"), Ok(RELEASE.to_vec()));
        for bad in [&b""[..], b"/a/", b"//", b"/a//b", b"a b", b"/a\xff", b"a/"] {
            assert_eq!(ok(bad), Err(Errno::EINVAL), "{bad:?}");
        }
        assert!(canonicalize(b"@x", b"", false, 2048).is_err());
    }

    #[test]
    fn walks() {
        let all = |p: &'static [u8]| prefixes(p).collect::<Vec<_>>();
        assert_eq!(all(b"/"), [b"/"]);
        assert_eq!(all(b"/a/bc"), [&b"/"[..], b"/a", b"/a/bc"]);
        assert_eq!(all(RELEASE), [RELEASE]);
        assert_eq!(names(b"/").collect::<Vec<_>>(), [b""]);
        assert_eq!(names(b"/a/b").collect::<Vec<_>>(), [&b""[..], b"a", b"b"]);
        assert_eq!(parent(b"/a/b"), Some(&b"/a"[..]));
        assert_eq!(parent(b"/a"), Some(&b"/"[..]));
        assert_eq!(parent(b"/"), None);
    }

    /// XSA-323: the length is judged with the prefix in place, and dom0 can read what a guest could write.
    #[test]
    fn xsa_323_length_with_prefix() {
        let base = b"/local/domain/65535";
        for len in 2040..2060 {
            let name = vec![b'a'; len];
            let guest = canonicalize(&name, base, false, 2048);
            assert_eq!(guest.is_ok(), len <= 2048, "{len}");
            if let Ok(path) = guest {
                assert!(canonicalize(&path, b"", false, usize::MAX).is_ok());
            }
        }
        assert!(canonicalize(&[b"/".as_slice(), &[b'a'; 3071]].concat(), b"", false, usize::MAX).is_ok());
        assert!(canonicalize(&[b"/".as_slice(), &[b'a'; 3072]].concat(), b"", false, usize::MAX).is_err());
    }
}

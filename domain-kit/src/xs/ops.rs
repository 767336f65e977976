//! The store's operations, the same on a connection and inside a transaction.

use super::wire::Op;
use super::{XsErrno, XsError};

/// Operations on nodes. Implemented by [`super::XsClient`] and [`super::Tx`].
///
/// Paths are absolute (`/local/domain/3/name`) or relative to the caller's `/local/domain/<domid>`.
/// Every method fails with [`XsError::Errno`] on an error reply and with [`XsError::Timeout`] when the
/// client's deadline passes.
pub trait XsOps {
    /// Sends one request and returns its reply's payload. `parts` are concatenated.
    ///
    /// # Errors
    /// See [`XsError`].
    fn request(&self, op: Op, parts: &[&[u8]]) -> Result<Vec<u8>, XsError>;

    /// READ: the octets at `path`.
    ///
    /// # Errors
    /// ENOENT, EACCES.
    fn read(&self, path: &str) -> Result<Vec<u8>, XsError> {
        self.request(Op::Read, &[&nul(path)?])
    }

    /// READ as text; bytes that are not UTF-8 are replaced.
    ///
    /// # Errors
    /// As [`XsOps::read`].
    fn read_string(&self, path: &str) -> Result<String, XsError> {
        Ok(String::from_utf8_lossy(&self.read(path)?).into_owned())
    }

    /// READ as text; `None` when the node does not exist.
    ///
    /// # Errors
    /// As [`XsOps::read`], without ENOENT.
    fn read_opt(&self, path: &str) -> Result<Option<String>, XsError> {
        match self.read_string(path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// WRITE: stores `value`, creating the node and its missing parents.
    ///
    /// # Errors
    /// EACCES, EINVAL, ENOSPC (quota).
    fn write(&self, path: &str, value: impl AsRef<[u8]>) -> Result<(), XsError>
    where
        Self: Sized,
    {
        self.request(Op::Write, &[&nul(path)?, value.as_ref()]).map(drop)
    }

    /// MKDIR: makes sure that the node exists.
    ///
    /// # Errors
    /// As [`XsOps::write`].
    fn mkdir(&self, path: &str) -> Result<(), XsError> {
        self.request(Op::Mkdir, &[&nul(path)?]).map(drop)
    }

    /// RM: removes the node and all below it.
    ///
    /// # Errors
    /// ENOENT when the parent does not exist either, EACCES.
    fn rm(&self, path: &str) -> Result<(), XsError> {
        self.request(Op::Rm, &[&nul(path)?]).map(drop)
    }

    /// The names of the node's children. Uses DIRECTORY_PART when they do not fit one reply.
    ///
    /// # Errors
    /// ENOENT, EACCES.
    fn directory(&self, path: &str) -> Result<Vec<String>, XsError> {
        match self.request(Op::Directory, &[&nul(path)?]) {
            Ok(list) => Ok(strings(&list)),
            Err(e) if e.is(XsErrno::E2BIG) => self.directory_parts(path),
            Err(e) => Err(e),
        }
    }

    /// The children by DIRECTORY_PART, started again when the node changes meanwhile.
    ///
    /// # Errors
    /// As [`XsOps::directory`].
    fn directory_parts(&self, path: &str) -> Result<Vec<String>, XsError> {
        'again: loop {
            let mut list = Vec::new();
            let mut generation = None;
            loop {
                let offset = nul(&list.len().to_string())?;
                let part = self.request(Op::DirectoryPart, &[&nul(path)?, &offset])?;
                let Some(end) = part.iter().position(|b| *b == 0) else {
                    return Err(XsError::Protocol("DIRECTORY_PART without a generation"));
                };
                let (found, names) = (part[..end].to_vec(), &part[end + 1..]);
                if *generation.get_or_insert_with(|| found.clone()) != found {
                    continue 'again;
                }
                // An empty name ends the list.
                let done = names.last() == Some(&0) && (names.len() == 1 || names[names.len() - 2] == 0);
                list.extend_from_slice(if done { &names[..names.len() - 1] } else { names });
                if done {
                    return Ok(strings(&list));
                }
                if names.is_empty() {
                    return Err(XsError::Protocol("DIRECTORY_PART makes no progress"));
                }
            }
        }
    }

    /// GET_PERMS: entries such as `n0` or `r3`, the owner first.
    ///
    /// # Errors
    /// ENOENT, EACCES.
    fn get_perms(&self, path: &str) -> Result<Vec<String>, XsError> {
        Ok(strings(&self.request(Op::GetPerms, &[&nul(path)?])?))
    }

    /// SET_PERMS: replaces the node's entries; the first names the owner.
    ///
    /// # Errors
    /// EACCES, EPERM (owner changed by an unprivileged caller), EINVAL, ENOSPC.
    fn set_perms(&self, path: &str, perms: &[&str]) -> Result<(), XsError> {
        let mut payload = nul(path)?;
        for perm in perms {
            payload.extend_from_slice(&nul(perm)?);
        }
        self.request(Op::SetPerms, &[&payload]).map(drop)
    }

    /// Whether the node exists and may be read.
    ///
    /// # Errors
    /// All but ENOENT.
    fn exists(&self, path: &str) -> Result<bool, XsError> {
        match self.read(path) {
            Ok(_) => Ok(true),
            Err(e) if e.is_not_found() => Ok(false),
            Err(e) => Err(e),
        }
    }
}

/// `text` with its terminating nul.
pub(crate) fn nul(text: &str) -> Result<Vec<u8>, XsError> {
    if text.as_bytes().contains(&0) {
        return Err(XsError::Nul);
    }
    let mut out = Vec::with_capacity(text.len() + 1);
    out.extend_from_slice(text.as_bytes());
    out.push(0);
    Ok(out)
}

/// Splits a list of nul-terminated strings.
pub(crate) fn strings(payload: &[u8]) -> Vec<String> {
    payload
        .split(|b| *b == 0)
        .filter(|s| !s.is_empty())
        .map(|s| String::from_utf8_lossy(s).into_owned())
        .collect()
}

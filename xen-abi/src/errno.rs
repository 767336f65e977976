//! `errno.h`: Xen's error numbers. They are positive here; a hypercall returns them negated
//! (`-i64::from(EINVAL)`). On x86 they equal Linux's, except for `ERESTART`, which never reaches a guest.

consts! { "errno.h";
    i32 {
        EPERM(XEN_EPERM) = 1;
        ENOENT(XEN_ENOENT) = 2;
        ESRCH(XEN_ESRCH) = 3;
        EIO(XEN_EIO) = 5;
        ENXIO(XEN_ENXIO) = 6;
        E2BIG(XEN_E2BIG) = 7;
        ENOEXEC(XEN_ENOEXEC) = 8;
        EBADF(XEN_EBADF) = 9;
        ECHILD(XEN_ECHILD) = 10;
        EAGAIN(XEN_EAGAIN) = 11;
        ENOMEM(XEN_ENOMEM) = 12;
        EACCES(XEN_EACCES) = 13;
        EFAULT(XEN_EFAULT) = 14;
        EBUSY(XEN_EBUSY) = 16;
        EEXIST(XEN_EEXIST) = 17;
        EXDEV(XEN_EXDEV) = 18;
        ENODEV(XEN_ENODEV) = 19;
        ENOTDIR(XEN_ENOTDIR) = 20;
        EISDIR(XEN_EISDIR) = 21;
        EINVAL(XEN_EINVAL) = 22;
        ENFILE(XEN_ENFILE) = 23;
        EMFILE(XEN_EMFILE) = 24;
        ENOSPC(XEN_ENOSPC) = 28;
        EROFS(XEN_EROFS) = 30;
        EMLINK(XEN_EMLINK) = 31;
        EDOM(XEN_EDOM) = 33;
        ERANGE(XEN_ERANGE) = 34;
        EDEADLK(XEN_EDEADLK) = 35;
        ENAMETOOLONG(XEN_ENAMETOOLONG) = 36;
        ENOLCK(XEN_ENOLCK) = 37;
        ENOSYS(XEN_ENOSYS) = 38;
        ENOTEMPTY(XEN_ENOTEMPTY) = 39;
        ENODATA(XEN_ENODATA) = 61;
        ETIME(XEN_ETIME) = 62;
        EBADMSG(XEN_EBADMSG) = 74;
        EOVERFLOW(XEN_EOVERFLOW) = 75;
        EILSEQ(XEN_EILSEQ) = 84;
        ENOTSOCK(XEN_ENOTSOCK) = 88;
        EMSGSIZE(XEN_EMSGSIZE) = 90;
        EOPNOTSUPP(XEN_EOPNOTSUPP) = 95;
        EADDRINUSE(XEN_EADDRINUSE) = 98;
        EADDRNOTAVAIL(XEN_EADDRNOTAVAIL) = 99;
        ENOBUFS(XEN_ENOBUFS) = 105;
        EISCONN(XEN_EISCONN) = 106;
        ENOTCONN(XEN_ENOTCONN) = 107;
        ETIMEDOUT(XEN_ETIMEDOUT) = 110;
        ECONNREFUSED(XEN_ECONNREFUSED) = 111;
    }
}

/// The name, such as `"EINVAL"`, of a positive or negated error number.
pub fn name(errno: i32) -> Option<&'static str> {
    let wanted = i128::from(errno.unsigned_abs());
    let (c_name, _) = C_CONSTS.iter().find(|(_, value)| *value == wanted)?;
    c_name.strip_prefix("XEN_")
}

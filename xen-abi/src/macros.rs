//! The three macros that keep the ABI tables short: structs, constants, enums.

/// Defines ABI structs: `pub struct Name("C name") [size] { field("C name"): Type = offset, … }`. The C names are
/// optional; a field that starts with `_` is padding. Size and offsets are asserted at compile time.
macro_rules! abi {
    ($header:literal; $(
        $(#[$meta:meta])*
        pub struct $name:ident $(($cname:literal))? [$size:expr] {
            $( $(#[$fmeta:meta])* $field:ident $(($cfield:literal))? : $ty:ty = $off:expr, )*
        }
    )*) => { $(
        $(#[$meta])*
        #[doc = concat!("\n\nSource: `xen/", $header, "`", $( ", `", $cname, "`", )? ".")]
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[derive(zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout)]
        pub struct $name {
            $( $(#[$fmeta])* #[doc = concat!("\n\nByte ", stringify!($off), ".")] pub $field: $ty, )*
        }
        const _: () = {
            assert!(core::mem::size_of::<$name>() == $size);
            $( assert!(core::mem::offset_of!($name, $field) == $off); )*
        };
        impl Default for $name {
            /// All bytes zero, padding included.
            fn default() -> Self {
                zerocopy::FromZeros::new_zeroed()
            }
        }
        impl $crate::CLayout for $name {
            const C_NAME: &'static str = concat!($($cname)?);
            const HEADER: &'static str = $header;
            const FIELDS: &'static [(&'static str, usize, usize)] = &[$((
                c_name!($field $($cfield)?),
                core::mem::offset_of!($name, $field),
                core::mem::size_of::<$ty>(),
            )),*];
        }
    )* };
}

/// Defines constants by type, each with its C name where that differs, and lists them in `C_CONSTS` (or the table
/// named after `as`).
macro_rules! consts {
    ($header:literal; $($rest:tt)*) => {
        consts! { $header as C_CONSTS; $($rest)* }
    };
    ($header:literal as $table:ident; $( $ty:ty { $( $(#[$meta:meta])* $name:ident $(($cname:ident))? = $value:expr; )* } )*) => {
        $( $(
            $(#[$meta])*
            #[doc = concat!("\n\n`", c_name!($name $($cname)?), "` of `xen/", $header, "`.")]
            pub const $name: $ty = $value;
        )* )*
        /// Every constant above by its C name, for the comparison with the headers.
        pub const $table: &[(&str, i128)] = &[$( $( (c_name!($name $($cname)?), $name as i128), )* )*];
    };
}

/// Defines an enum of wire values with `ALL`, `from_raw`, `raw` and `c_name`.
macro_rules! wire_enum {
    ($header:literal; $(#[$meta:meta])* pub enum $name:ident : $ty:ident {
        $( $(#[$vmeta:meta])* $variant:ident ($cname:ident) = $value:literal, )*
    }) => {
        $(#[$meta])*
        #[doc = concat!("\n\nSource: `xen/", $header, "`.")]
        #[repr($ty)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $( $(#[$vmeta])* #[doc = concat!("\n\n`", stringify!($cname), "`.")] $variant = $value, )*
        }
        impl $name {
            /// Every value, in ascending order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The value a peer wrote, or `None` if the ABI doesn't define it.
            pub const fn from_raw(raw: $ty) -> Option<Self> {
                match raw {
                    $( $value => Some(Self::$variant), )*
                    _ => None,
                }
            }

            /// The value on the wire.
            pub const fn raw(self) -> $ty {
                self as $ty
            }

            /// The name in the C header.
            pub const fn c_name(self) -> &'static str {
                match self {
                    $( Self::$variant => stringify!($cname), )*
                }
            }
        }
    };
}

/// The C name of an item: its own unless another is given.
macro_rules! c_name {
    ($name:ident) => {
        stringify!($name)
    };
    ($name:ident $cname:ident) => {
        stringify!($cname)
    };
    ($name:ident $cname:literal) => {
        $cname
    };
}

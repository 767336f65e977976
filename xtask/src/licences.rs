//! Licence and origin check over `cargo metadata`, by the rules of `deny.toml`.

use crate::{paths, run};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs;
use std::process::Command;

/// Checks every dependency for our target; the error lists all that may not be there.
///
/// # Errors
/// When a licence is not allowed or absent, or a package is from another place than crates.io.
pub fn check() -> Result<()> {
    let rules = paths::root().join("deny.toml");
    let text = fs::read_to_string(&rules).with_context(|| format!("cannot read {}", rules.display()))?;
    let allowed = allow_list(&text);
    if allowed.is_empty() {
        bail!("{} allows no licence", rules.display());
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let json = run::quiet(
        Command::new(cargo)
            .args(["metadata", "--format-version=1", "--filter-platform", paths::TARGET])
            .current_dir(paths::root()),
    )?;
    let metadata: Value = serde_json::from_str(&json).context("cargo metadata")?;
    let packages = metadata["packages"].as_array().context("cargo metadata has no packages")?;
    let mut bad = Vec::new();
    for package in packages {
        let name = format!(
            "{} {}",
            package["name"].as_str().unwrap_or("?"),
            package["version"].as_str().unwrap_or("?")
        );
        match package["license"].as_str() {
            None => bad.push(format!("{name}: no licence named")),
            Some(expr) if !allows(expr, &allowed) => bad.push(format!("{name}: {expr}")),
            Some(_) => {}
        }
        // A path dependency has no source; a registry other than crates.io has another address.
        if let Some(source) = package["source"].as_str()
            && !(source.starts_with("registry+") && source.contains("crates.io-index"))
        {
            bad.push(format!("{name}: not from crates.io"));
        }
    }
    if !bad.is_empty() {
        bail!("not allowed by deny.toml:\n  {}", bad.join("\n  "));
    }
    println!("{} packages, {} licences allowed: all good", packages.len(), allowed.len());
    Ok(())
}

/// The strings of the first `allow = [ … ]`.
fn allow_list(text: &str) -> Vec<String> {
    let Some((_, rest)) = text.split_once("allow = [") else {
        return Vec::new();
    };
    let list = rest.split(']').next().unwrap_or("");
    list.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Evaluates an SPDX expression (annex D of the specification): AND binds tighter than OR, a WITH
/// clause belongs to its licence. The old form `A/B` means OR.
fn allows(expr: &str, allowed: &[String]) -> bool {
    let spaced = expr.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    any(&tokens, &mut at, allowed) == Some(true) && at == tokens.len()
}

/// Each level returns whether its part is allowed, or nothing when it is malformed.
fn any(tokens: &[&str], at: &mut usize, allowed: &[String]) -> Option<bool> {
    let mut ok = all(tokens, at, allowed)?;
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        ok |= all(tokens, at, allowed)?;
    }
    Some(ok)
}

fn all(tokens: &[&str], at: &mut usize, allowed: &[String]) -> Option<bool> {
    let mut ok = one(tokens, at, allowed)?;
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        ok &= one(tokens, at, allowed)?;
    }
    Some(ok)
}

fn one(tokens: &[&str], at: &mut usize, allowed: &[String]) -> Option<bool> {
    let token = *tokens.get(*at)?;
    *at += 1;
    if token == "(" {
        let ok = any(tokens, at, allowed)?;
        if *tokens.get(*at)? != ")" {
            return None;
        }
        *at += 1;
        return Some(ok);
    }
    let mut licence = token.to_owned();
    if tokens.get(*at) == Some(&"WITH") {
        licence = format!("{licence} WITH {}", tokens.get(*at + 1)?);
        *at += 2;
    }
    Some(allowed.contains(&licence))
}

#[cfg(test)]
mod tests {
    use super::{allow_list, allows};

    #[test]
    fn expressions() {
        let list = allow_list("x = 1\nallow = [\n \"MIT\",\n \"A WITH e\",\n]\nother = [\"GPL\"]");
        assert_eq!(list, ["MIT", "A WITH e"]);
        for good in ["MIT", "MIT OR GPL", "GPL/MIT", "(GPL OR MIT) AND MIT", "A WITH e"] {
            assert!(allows(good, &list), "{good}");
        }
        for bad in ["GPL", "MIT AND GPL", "A", "MIT OR", "(MIT", "MIT AND (GPL OR A)", ""] {
            assert!(!allows(bad, &list), "{bad}");
        }
    }
}

//! Firewall rules at the paths that Qubes OS uses, so that its tools can drive them: in this domain's part of the store,
//!
//! ```text
//!   qubes-firewall/<address>/policy   accept | drop
//!   qubes-firewall/<address>/0000     action=accept dsthost=example.org proto=tcp dstports=443-443
//!   qubes-firewall/<address>/0001     …
//!   qubes-firewall/<address>          written last, with nothing: now they hold
//! ```
//! QubesDB takes an address as it is; xenstore allows neither dots nor colons in a path, so each of them is written `_` here:
//! `10_137_0_9`, `fd09_24ef_4179__9`. They are about packets *from* that address, whichever vif they come from, beside the vif's own rules. As there, a set
//! that cannot be understood blocks its address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use domain_kit::xs::{XsClient, XsError, XsOps};

use crate::switch::Switch;
use crate::switch::rules::{Action, Firewall, MAX_RULES, RuleError};

/// Where they are.
const ROOT: &str = "qubes-firewall";
/// Most addresses with rules.
const MAX_SOURCES: usize = 512;

/// Rules by source address.
pub type Sources = BTreeMap<IpAddr, Firewall>;

/// Makes a set of what stands below an address: (name, value).
///
/// # Errors
/// [`RuleError`] for what cannot be understood.
pub fn parse(entries: &BTreeMap<String, String>) -> Result<Firewall, RuleError> {
    let policy = entries.get("policy").ok_or_else(|| RuleError("policy is missing".into()))?;
    let mut firewall = Firewall { rules: Vec::new(), policy: policy.parse()? };
    // In the order of their numbers, as the map has them.
    for (name, rule) in entries.iter().filter(|(name, _)| *name != "policy") {
        if name.len() != 4 || !name.bytes().all(|b| b.is_ascii_digit()) {
            return Err(RuleError(format!("{name:?} is no rule's number (0000 to 9999)")));
        }
        if firewall.rules.len() >= MAX_RULES {
            return Err(RuleError(format!("more than {MAX_RULES} rules")));
        }
        firewall.rules.push(rule.parse()?);
    }
    Ok(firewall)
}

/// The address that a node's name stands for.
fn source(name: &str) -> Option<IpAddr> {
    let four = || name.replace('_', ".").parse().ok().map(IpAddr::V4);
    four().or_else(|| name.replace('_', ":").parse().ok().map(IpAddr::V6))
}

fn block() -> Firewall {
    Firewall { rules: Vec::new(), policy: Action::Drop }
}

/// All of it, in one consistent look.
fn read_all(xs: &XsClient, only: Option<&BTreeSet<IpAddr>>) -> Result<Sources, XsError> {
    xs.transaction(|tx| {
        let mut out = Sources::new();
        let names = match tx.directory(ROOT) {
            Err(e) if e.is_not_found() => Vec::new(),
            names => names?,
        };
        for name in names.into_iter().take(MAX_SOURCES) {
            let Some(source) = source(&name) else { continue };
            if only.is_some_and(|only| !only.contains(&source)) {
                continue;
            }
            let mut entries = BTreeMap::new();
            for rule in tx.directory(&format!("{ROOT}/{name}"))?.into_iter().take(MAX_RULES + 2) {
                let value = tx.read_string(&format!("{ROOT}/{name}/{rule}"))?;
                entries.insert(rule, value);
            }
            // Just made, and not written yet.
            if entries.is_empty() {
                continue;
            }
            let firewall = parse(&entries).unwrap_or_else(|error| {
                tracing::error!(%source, %error, "the address is blocked");
                block()
            });
            out.insert(source, firewall);
        }
        Ok(out)
    })
}

/// Follows the store for ever.
pub fn run(xs: &XsClient, switch: &Arc<Switch>) {
    let watches = loop {
        let watches = xs.watch_set().and_then(|set| set.watch(ROOT, ROOT).map(|()| set));
        match watches {
            Ok(watches) => break watches,
            Err(error) => {
                tracing::warn!(%error, "qubes-firewall is not watched yet");
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    };
    // The predecessor's hold until the store was read.
    let mut all = true;
    let mut due = BTreeSet::new();
    loop {
        if all || !due.is_empty() {
            match read_all(xs, (!all).then_some(&due)) {
                Ok(found) => {
                    let mut sources = if all { Sources::new() } else { switch.sources() };
                    sources.retain(|source, _| !due.contains(source));
                    sources.extend(found);
                    switch.set_sources(sources);
                    all = false;
                    due.clear();
                }
                Err(error) => tracing::warn!(%error, "qubes-firewall cannot be read yet"),
            }
        }
        let wait = if all || !due.is_empty() { Duration::from_secs(1) } else { Duration::from_secs(3600) };
        let mut event = watches.next_timeout(wait);
        while let Some(e) = event {
            let parts: Vec<&str> = e.path.rsplit(ROOT).next().unwrap_or_default().split('/').collect();
            match parts[..] {
                // The address itself: its rules are complete. Rules by themselves wait for that.
                ["", name] => due.extend(source(name)),
                // Made or removed as a whole, or watched anew.
                [""] => all = true,
                _ => {}
            }
            event = watches.try_next();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_nodes() {
        assert_eq!(source("10_137_0_9"), Some([10, 137, 0, 9].into()));
        assert_eq!(source("fd09_24ef_4179__9"), Some("fd09:24ef:4179::9".parse().unwrap()));
        assert_eq!(source("policy"), None);
    }

    #[test]
    fn sets_as_qubes_writes_them() {
        let entries = |list: &[(&str, &str)]| {
            list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<BTreeMap<_, _>>()
        };
        let good = entries(&[
            ("policy", "drop"),
            ("0000", "action=accept dst4=10.0.0.0/8 proto=tcp dstports=443-443"),
            ("0001", "action=accept specialtarget=dns"),
            ("0002", "action=drop"),
        ]);
        let firewall = parse(&good).unwrap();
        assert_eq!((firewall.rules.len(), firewall.policy), (3, Action::Drop));
        assert_eq!(firewall.rules[1].to_string(), "action=accept specialtarget=dns");
        for bad in [
            entries(&[("0000", "action=accept")]),
            entries(&[("policy", "drop"), ("1", "action=accept")]),
            entries(&[("policy", "drop"), ("comment", "x")]),
            entries(&[("policy", "drop"), ("0000", "proto=tcp")]),
            entries(&[("policy", "maybe")]),
        ] {
            assert!(parse(&bad).is_err(), "{bad:?}");
        }
    }
}

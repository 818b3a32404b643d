//! Sixteen ranks on four hosts: network namespaces of their own, each with an address, behind one switch. The same run as on
//! one rank, whether rank 0's host is given by its address or by a name, which that host knows as 127.0.1.1, as Debian sets it up. Where no namespaces may be made (it takes root and `ip`), the test says so.

mod lab;

use lab::Lab;
use std::process::{Command, Stdio};

const HOSTS: usize = 4;
const RANKS: usize = 16;
const STEPS: u64 = 8;

/// Four hosts and a switch; gone when dropped.
struct Hosts {
    names: Vec<String>,
}

impl Hosts {
    /// Nothing, and why, if the system does not allow it.
    fn new() -> Result<Hosts, String> {
        let prefix = format!("fopt{}", std::process::id());
        let hosts = Hosts { names: (0..=HOSTS).map(|host| format!("{prefix}-{host}")).collect() };
        for name in &hosts.names {
            ip(&["netns", "add", name])?;
        }
        let switch = &hosts.names[HOSTS];
        ip(&["-n", switch, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", switch, "link", "set", "br0", "up"])?;
        for (host, name) in hosts.names[..HOSTS].iter().enumerate() {
            let (port, address) = (format!("p{host}"), format!("{}/24", address(host)));
            ip(&[
                "link", "add", "e0", "netns", name, "type", "veth", "peer", "name", &port, "netns", switch,
            ])?;
            ip(&["-n", switch, "link", "set", &port, "master", "br0", "up"])?;
            ip(&["-n", name, "addr", "add", &address, "dev", "e0"])?;
            ip(&["-n", name, "link", "set", "e0", "up"])?;
            ip(&["-n", name, "link", "set", "lo", "up"])?;
        }
        Ok(hosts)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            // One that was not made cannot be removed.
            let _ = ip(&["netns", "del", name]);
        }
    }
}

fn address(host: usize) -> String {
    format!("10.77.0.{}", host + 1)
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let out = Command::new("ip").args(arguments).output().map_err(|e| format!("ip cannot be run: {e}"))?;
    if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).trim().into()) }
}

#[test]
fn four_hosts_give_the_numbers_of_one_rank() {
    let hosts = match Hosts::new() {
        Ok(hosts) => hosts,
        Err(why) => return println!("skipped: no network namespaces can be made here: {why}"),
    };
    let lab = Lab::new();
    let common = [
        "model.heads=4",
        "model.vocab=264",
        "model.positions=16",
        "batch.tokens=256",
        "batch.micro_batch=1",
        "run.precision=f32",
        "run.threads=1",
    ];
    lab.train(&lab.config("one", STEPS), &common);
    let known_as = |host: usize| {
        let file = lab.path(&format!("hosts-{host}"));
        let first = if host == 0 { "127.0.1.1".into() } else { address(0) };
        std::fs::write(&file, format!("127.0.0.1 localhost\n{first} first\n")).unwrap();
        file
    };
    let names = [0, 1, 2, 3].map(known_as);
    for (name, layout, first) in [
        ("sharded", ["parallel.tensor=1", "parallel.shard=16"], address(0)),
        ("mixed", ["parallel.tensor=2", "parallel.shard=4"], "first".into()),
    ] {
        let config = lab.config(name, STEPS);
        let set: Vec<&str> = common.iter().chain(&layout).copied().collect();
        let start = |rank: usize| {
            let inner = lab::train(&config, &set);
            let host = rank * HOSTS / RANKS;
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &hosts.names[host]]);
            // What `ip` runs has mounts of its own.
            command.args(["sh", "-c", "mount --bind \"$HOSTS\" /etc/hosts && exec \"$0\" \"$@\""]);
            command.arg(inner.get_program()).args(inner.get_args()).env("HOSTS", &names[host]);
            command.env("RANK", rank.to_string()).env("WORLD_SIZE", RANKS.to_string());
            command.env("MASTER_ADDR", &first).env("MASTER_PORT", "29500");
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let ranks: Vec<_> = (0..RANKS).map(start).collect();
        for (rank, process) in ranks.into_iter().enumerate() {
            let out = process.wait_with_output().unwrap();
            assert!(out.status.success(), "{name}: rank {rank} failed:\n{}", lab::text(&out));
        }
        for key in ["loss", "grad_norm"] {
            let (one, many) = (lab.metric("one", key), lab.metric(name, key));
            assert_eq!((one.len(), many.len()), (STEPS as usize, STEPS as usize));
            for ((step, a), (_, b)) in one.iter().zip(&many) {
                assert!((a - b).abs() <= 2e-5 * a, "{name}, step {step}: {key} {b}, on one rank {a}");
            }
        }
    }
}

//! Who this process is among many, as whoever started it says in environment variables.

use anyhow::{Context, Result, bail, ensure};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::net::Ipv6Addr;

/// How this process was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Launch {
    /// Alone.
    Solo,
    /// By `mpirun`, or told to use MPI.
    Mpi {
        /// How many ranks there are, and the variable that says so.
        told: Option<(&'static str, usize)>,
    },
    /// As one of several that meet over TCP.
    Tcp {
        rank: usize,
        size: usize,
        /// Where rank 0 listens.
        address: String,
        port: u16,
        /// Tells ranks of this run from strangers.
        token: String,
    },
}

/// Port of rank 0 unless it is given; torchrun's.
const PORT: u16 = 29500;
/// The first of the ports that follow from a job, and how many there are: below those that systems give to whoever asks for any.
const JOB_PORTS: (u16, u64) = (20000, 12000);
/// Steps of SLURM from this number on are no programs that `srun` has started, but a job's script or shell.
const NO_STEP: u32 = 0xffff_fff0;

/// Reads the variables of torchrun and Kubernetes, `mpirun`, and `srun`, in this order.
///
/// # Errors
/// When they contradict each other or make no sense; the message names them and their values.
pub(crate) fn launch(variable: &dyn Fn(&str) -> Option<String>) -> Result<Launch> {
    let forced = variable("FERROPT_TRANSPORT");
    match forced.as_deref() {
        None | Some("tcp" | "mpi") => {}
        Some(other) => bail!(
            "FERROPT_TRANSPORT is {other:?}, but it is \"tcp\" or \"mpi\"; remove it to let Ferropt choose"
        ),
    }
    let number = |name: &str| -> Result<Option<usize>> {
        let Some(text) = variable(name) else { return Ok(None) };
        let number = text.trim().parse();
        number
            .map(Some)
            .with_context(|| format!("the environment variable {name} is {text:?}, which is no number"))
    };
    let told = || -> Result<Option<(&'static str, usize)>> {
        for name in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"] {
            if let Some(size) = number(name)? {
                return Ok(Some((name, size)));
            }
        }
        Ok(None)
    };
    if forced.as_deref() == Some("mpi") {
        return Ok(Launch::Mpi { told: told()? });
    }
    let port_of = |name: &str| -> Result<Option<u16>> {
        let Some(port) = number(name)? else { return Ok(None) };
        let valid = u16::try_from(port).ok().filter(|port| *port > 0);
        let wrong = || format!("{name} is {port}, but a port is a number from 1 to 65535");
        valid.with_context(wrong).map(Some)
    };
    let (own, port) = (port_of("FERROPT_PORT")?, port_of("MASTER_PORT")?);
    if let Some(size) = number("WORLD_SIZE")? {
        let (name, rank) = match (number("RANK")?, number("JOB_COMPLETION_INDEX")?) {
            (Some(rank), _) => ("RANK", rank),
            // An indexed job of Kubernetes.
            (None, Some(rank)) => ("JOB_COMPLETION_INDEX", rank),
            (None, None) => bail!(
                "WORLD_SIZE is {size}, but RANK says not which of them this is; set RANK (or JOB_COMPLETION_INDEX), or remove \
                 WORLD_SIZE to run alone"
            ),
        };
        ensure!(
            size > 0 && rank < size,
            "{name} is {rank} and WORLD_SIZE is {size}, but ranks are numbered from 0 to one less than their number"
        );
        if size == 1 {
            return Ok(Launch::Solo);
        }
        let address = master(variable)?.with_context(|| {
            format!(
                "WORLD_SIZE is {size}, but MASTER_ADDR does not say where rank 0 is; set it to rank 0's host"
            )
        })?;
        let port = beside_agent(variable, port.unwrap_or(PORT));
        return Ok(tcp(variable, rank, size, address, own.unwrap_or(port)));
    }
    if let Some(rank) = number("RANK")? {
        bail!(
            "RANK is {rank}, but WORLD_SIZE says not how many ranks there are; set it, or remove RANK to run alone"
        );
    }
    let is_set = |name: &str| variable(name).is_some();
    let step = variable("SLURM_STEP_ID").and_then(|step| step.parse::<u32>().ok());
    let in_step = step.is_some_and(|step| step < NO_STEP);
    // `srun` sets PMI_SIZE too where SLURM speaks that protocol, but only Hydra (MPICH, Intel MPI) says how many are on this host.
    let by_hydra = is_set("PMI_SIZE") && (is_set("MPI_LOCALNRANKS") || !in_step);
    if forced.is_none() && (is_set("OMPI_COMM_WORLD_SIZE") || by_hydra) {
        return Ok(Launch::Mpi { told: told()? });
    }
    // `sbatch` sets SLURM_NTASKS for its script too, which is no task of it.
    let tasks = if is_set("SLURM_STEP_NUM_TASKS") { "SLURM_STEP_NUM_TASKS" } else { "SLURM_NTASKS" };
    let counts = [
        (true, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        (true, "PMI_RANK", "PMI_SIZE"),
        (in_step, "SLURM_PROCID", tasks),
    ];
    for (_, rank, size) in counts.into_iter().filter(|(counts, ..)| *counts) {
        if let (Some(rank), Some(size)) = (number(rank)?, number(size)?)
            && size > 1
        {
            let (slurm_host, slurm_port) = slurm(variable)?;
            let address = master(variable)?.or(slurm_host).with_context(|| {
                format!("there are {size} ranks, but MASTER_ADDR does not say where rank 0 is; set it to rank 0's host")
            })?;
            let port = own.or(port).or(slurm_port).unwrap_or(PORT);
            return Ok(tcp(variable, rank, size, address, port));
        }
    }
    Ok(Launch::Solo)
}

/// Rank 0's host, if it is given: a name or an address, IPv6 with brackets or without.
fn master(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<String>> {
    let Some(text) = variable("MASTER_ADDR") else { return Ok(None) };
    let trimmed = text.trim();
    let inner = trimmed.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(trimmed);
    let is_host = |c: char| c.is_alphanumeric() || ".-_:%".contains(c);
    ensure!(
        !inner.is_empty() && inner.chars().all(is_host),
        "MASTER_ADDR is {text:?}, which is no host; set it to the name or the address of rank 0's host, without a port"
    );
    ensure!(
        !inner.parse::<Ipv6Addr>().is_ok_and(|address| address.is_unicast_link_local()),
        "MASTER_ADDR is {text:?}, which is an address of one link only, but not of which; add this host's interface to it, as in \
         \"{inner}%eth0\", or give another address of rank 0's host"
    );
    Ok(Some(inner.into()))
}

fn tcp(
    variable: &dyn Fn(&str) -> Option<String>,
    rank: usize,
    size: usize,
    address: String,
    port: u16,
) -> Launch {
    // Against mistakes, not against malice: who can reach the ports of a cluster's inside belongs there.
    let secret = variable("FERROPT_TOKEN").or_else(|| variable("SLURM_JOB_ID")).unwrap_or_default();
    let token = BuildHasherDefault::<DefaultHasher>::default().hash_one((secret, port));
    Launch::Tcp { rank, size, address, port, token: format!("{token:016x}") }
}

/// The port to meet at where MASTER_PORT is `port`. torchrun's agents listen there themselves, and say so to those that they start: their
/// ranks meet at another one, which follows from it.
fn beside_agent(variable: &dyn Fn(&str) -> Option<String>, port: u16) -> u16 {
    if variable("TORCHELASTIC_USE_AGENT_STORE").as_deref() != Some("True") {
        return port;
    }
    let run = variable("TORCHELASTIC_RUN_ID").unwrap_or_default();
    job_port(BuildHasherDefault::<DefaultHasher>::default().hash_one((run, port)))
}

/// A port that all ranks of a job come to by its number.
fn job_port(number: u64) -> u16 {
    JOB_PORTS.0 + (number % JOB_PORTS.1) as u16
}

/// Rank 0's host and a port, of a step of SLURM.
fn slurm(variable: &dyn Fn(&str) -> Option<String>) -> Result<(Option<String>, Option<u16>)> {
    let list = variable("SLURM_STEP_NODELIST").or_else(|| variable("SLURM_JOB_NODELIST"));
    let host = list.as_deref().map(first_host).transpose()?;
    let number = |name: &str| variable(name).and_then(|text| text.parse::<u64>().ok());
    let (job, step) = (number("SLURM_JOB_ID"), number("SLURM_STEP_ID").unwrap_or(0));
    Ok((host, job.map(|job| job_port(job.wrapping_mul(7).wrapping_add(step)))))
}

/// The first host of SLURM's notation: `node[03-07,9],other` begins with node03.
fn first_host(list: &str) -> Result<String> {
    let wrong = || format!("the list of nodes {list:?} is not SLURM's notation");
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (name, rest) = list.split_at(end);
    ensure!(!name.is_empty() || rest.starts_with('['), wrong());
    let Some(rest) = rest.strip_prefix('[') else { return Ok(name.into()) };
    let (numbers, rest) = rest.split_once(']').with_context(wrong)?;
    let first = numbers.split([',', '-']).next().filter(|first| !first.is_empty()).with_context(wrong)?;
    let tail = &rest[..rest.find(',').unwrap_or(rest.len())];
    Ok(format!("{name}{first}{tail}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Launch> {
        launch(&|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    fn met(variables: &[(&str, &str)]) -> (usize, usize, String, u16) {
        match of(variables).unwrap() {
            Launch::Tcp { rank, size, address, port, .. } => (rank, size, address, port),
            other => panic!("{variables:?}: {other:?}"),
        }
    }

    #[test]
    fn launchers_are_understood() {
        assert_eq!(of(&[]).unwrap(), Launch::Solo);
        let torchrun = [("RANK", "3"), ("WORLD_SIZE", "8"), ("MASTER_ADDR", "host"), ("MASTER_PORT", "1234")];
        assert_eq!(met(&torchrun), (3, 8, "host".into(), 1234));
        let kubernetes = [("JOB_COMPLETION_INDEX", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "job-0.job")];
        assert_eq!(met(&kubernetes), (1, 2, "job-0.job".into(), PORT));
        for (given, host) in [("[::1]", "::1"), (" node7\n", "node7"), ("fe80::1%eth0", "fe80::1%eth0")] {
            let given = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", given)];
            assert_eq!(met(&given).2, host);
        }
        assert_eq!(of(&[("WORLD_SIZE", "1"), ("RANK", "0")]).unwrap(), Launch::Solo);
        let mpirun = [("OMPI_COMM_WORLD_SIZE", "4"), ("OMPI_COMM_WORLD_RANK", "1")];
        assert_eq!(of(&mpirun).unwrap(), Launch::Mpi { told: Some(("OMPI_COMM_WORLD_SIZE", 4)) });
        let hydra = [("PMI_SIZE", "3"), ("PMI_RANK", "0")];
        assert_eq!(of(&hydra).unwrap(), Launch::Mpi { told: Some(("PMI_SIZE", 3)) });
        let forced = [&mpirun[..], &[("FERROPT_TRANSPORT", "tcp"), ("MASTER_ADDR", "::1")]].concat();
        assert_eq!(met(&forced), (1, 4, "::1".into(), PORT));
        let step = [
            ("SLURM_PROCID", "5"),
            ("SLURM_NTASKS", "6"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_NODELIST", "gpu[007-009,20]-ib,cpu1"),
            ("SLURM_JOB_ID", "12345"),
        ];
        let (rank, size, address, port) = met(&step);
        assert_eq!((rank, size, address.as_str()), (5, 6, "gpu007-ib"));
        assert!(port >= JOB_PORTS.0);
        // SLURM may speak PMI, and Hydra may have been started through it.
        let pmi = [&step[..], &[("PMI_SIZE", "6"), ("PMI_RANK", "5")]].concat();
        assert_eq!(met(&pmi), (5, 6, "gpu007-ib".into(), port));
        let proxies = [&pmi[..], &[("MPI_LOCALNRANKS", "3")]].concat();
        assert_eq!(of(&proxies).unwrap(), Launch::Mpi { told: Some(("PMI_SIZE", 6)) });
        // A part of the job's tasks.
        let part = [&step[..], &[("SLURM_STEP_NUM_TASKS", "7")]].concat();
        assert_eq!(met(&part).1, 7);
        // The script of a batch job is none of the tasks, nor is the shell of an interactive one.
        let script = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "6"), ("SLURM_JOB_NODELIST", "a")];
        for id in [&[][..], &[("SLURM_STEP_ID", "4294967290")]] {
            assert_eq!(of(&[&script[..], id].concat()).unwrap(), Launch::Solo);
        }
    }

    #[test]
    fn ranks_of_torchrun_leave_its_port_to_its_agents() {
        let rank = [("RANK", "3"), ("WORLD_SIZE", "8"), ("MASTER_ADDR", "host"), ("MASTER_PORT", "29500")];
        let port = |more: &[(&str, &str)]| met(&[&rank[..], more].concat()).3;
        let agents = ("TORCHELASTIC_USE_AGENT_STORE", "True");
        let beside = port(&[agents, ("TORCHELASTIC_RUN_ID", "one")]);
        assert!((20000..32000).contains(&beside));
        assert_ne!(beside, port(&[agents, ("TORCHELASTIC_RUN_ID", "two")]));
        assert_eq!(port(&[("TORCHELASTIC_USE_AGENT_STORE", "False")]), 29500);
        assert_eq!(port(&[agents, ("FERROPT_PORT", "1234")]), 1234);
    }

    #[test]
    fn contradictions_are_named() {
        let cases: [(&[(&str, &str)], &str); 13] = [
            (&[("WORLD_SIZE", "4")], "RANK"),
            (&[("RANK", "1")], "WORLD_SIZE"),
            (&[("RANK", "4"), ("WORLD_SIZE", "4")], "RANK is 4 and WORLD_SIZE is 4"),
            (&[("RANK", "one"), ("WORLD_SIZE", "4")], "\"one\", which is no number"),
            (&[("RANK", "1"), ("WORLD_SIZE", "4")], "MASTER_ADDR"),
            (&[("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", " ")], "MASTER_ADDR is \" \""),
            (&[("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "http://a")], "no host"),
            (&[("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "[::1")], "no host"),
            (&[("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "[fe80::1]")], "\"fe80::1%eth0\""),
            (&[("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_PORT", "70000")], "70000"),
            (&[("FERROPT_PORT", "0")], "FERROPT_PORT is 0"),
            (&[("FERROPT_TRANSPORT", "carrier pigeon")], "carrier pigeon"),
            (
                &[
                    ("SLURM_PROCID", "1"),
                    ("SLURM_NTASKS", "2"),
                    ("SLURM_STEP_ID", "0"),
                    ("SLURM_STEP_NODELIST", "a[1"),
                ],
                "SLURM's notation",
            ),
        ];
        for (variables, words) in cases {
            let message = format!("{:#}", of(variables).unwrap_err());
            assert!(message.contains(words), "{variables:?}: {message}");
        }
    }

    #[test]
    fn first_hosts() {
        for (list, first) in
            [("a", "a"), ("a,b", "a"), ("n[3-4]", "n3"), ("n[03,5-6]", "n03"), ("r[1-2]n,x", "r1n")]
        {
            assert_eq!(first_host(list).unwrap(), first, "{list}");
        }
        assert!(first_host("").is_err() && first_host(",a").is_err() && first_host("n[]").is_err());
    }
}

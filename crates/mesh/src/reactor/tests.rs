use super::*;
use std::io::{self, Read};
use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::thread;

/// The only other rank: it hears everything, and says what a test lets it.
struct Other(Arc<Mutex<VecDeque<u8>>>);

impl Transport for Other {
    fn write(&mut self, _: usize, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn read(&mut self, _: usize, into: &mut [u8]) -> io::Result<usize> {
        self.0.lock().unwrap().read(into)
    }

    fn wait(&mut self, _: &[usize], _: &[usize], _: Duration) -> io::Result<()> {
        thread::sleep(Duration::from_millis(1));
        Ok(())
    }

    fn waker(&self) -> crate::transport::Waker {
        Arc::new(|| {})
    }

    fn name(&self) -> String {
        "a test".into()
    }

    fn host(&self, _: usize) -> &str {
        ""
    }
}

/// A rank that is not read cannot say why it ends, and what can be read and is not keeps a core busy.
#[test]
fn what_comes_after_a_failure_is_read_and_dropped() {
    const LEN: usize = 100_000;
    let says = Arc::<Mutex<VecDeque<u8>>>::default();
    let say = |bytes: &[u8]| {
        says.lock().unwrap().extend(bytes);
        let until = Instant::now() + Duration::from_secs(10);
        while !says.lock().unwrap().is_empty() {
            assert!(Instant::now() < until, "{} bytes are not read", says.lock().unwrap().len());
            thread::sleep(Duration::from_millis(1));
        }
    };
    let (commands, inbox) = channel();
    let limits = Limits { silence: Duration::from_secs(60), patience: Duration::from_secs(60) };
    let other = Box::new(Other(says.clone()));
    let reactor = Reactor::new(0, 2, other, inbox, limits, Trace::default(), Left::default(), Arc::default());
    let thread = thread::spawn(|| reactor.run());
    let (label, (done, end)) = (Label::new("much"), channel());
    let job = Job {
        operation: Operation::Send,
        group: "two",
        label,
        dtype: None,
        memory: Box::new(vec![0; LEN]),
        sends: Vec::new(),
        receives: vec![(1, Place::Memory(0..LEN))],
        whenever: false,
        done,
    };
    commands.send(Command::Post(job)).unwrap();
    say(&Header::data(Operation::Send, "two", label, None, LEN).to_bytes());
    say(&[1; LEN / 2]);
    commands.send(Command::Abandon(Lost::chosen("tired".into(), 1))).unwrap();
    assert_eq!(end.recv().unwrap().err().unwrap().into_lost().status(), Some(1));
    say(&[1; LEN / 2]);
    say(&Header::beat("step 1", None).to_bytes());
    drop(commands);
    thread.join().unwrap();
}

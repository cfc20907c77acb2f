//! Learns the addresses of kernel functions by which the programs recognize sockets, io_uring and epoll instances.

use std::os::{
    fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    unix::net::UnixDatagram,
};

use anyhow::{Context as _, Result, bail};
use rustix::event::{EventfdFlags, epoll, eventfd};

use crate::kernel::{
    iter::IterScope,
    layout::Feature,
    ring,
    scanner::{Record, Scanner, link, run},
};

impl Scanner {
    /// Learns the addresses of the `file_operations` of sockets, io_uring and epoll instances. A capability whose address cannot be
    /// learned is switched off.
    pub(super) fn learn_file_operations(&mut self) {
        if self.capabilities.rings.is_ok() {
            self.capabilities.rings = self.learn_rings().map_err(|error| format!("{error:#}"));
        }
        if self.capabilities.batched_scans.is_ok() || self.capabilities.epolls.is_ok() {
            let learned = self.learn_sockets().map_err(|error| format!("{error:#}"));
            for capability in [
                &mut self.capabilities.batched_scans,
                &mut self.capabilities.epolls,
            ] {
                if capability.is_ok() {
                    capability.clone_from(&learned);
                }
            }
        }
        if self.capabilities.epolls.is_ok() {
            self.capabilities.epolls = self.learn_epolls().map_err(|error| format!("{error:#}"));
        }
    }

    /// Learns the `file_operations` of io_uring by creating an instance.
    fn learn_rings(&mut self) -> Result<()> {
        let ring = ring::probe().context("cannot create an io_uring instance to probe")?;
        self.scan_settings.ring_operations = self.operations_of(ring.as_fd())?;
        Ok(())
    }

    /// Learns the `file_operations` of epoll instances and eventfds by creating one of each. Epoll last: it switches the count on.
    fn learn_epolls(&mut self) -> Result<()> {
        let event =
            eventfd(0, EventfdFlags::CLOEXEC).context("cannot create an eventfd to probe")?;
        self.scan_settings.eventfd_operations = self.operations_of(event.as_fd())?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC);
        let epoll = epoll.context("cannot create an epoll instance to probe")?;
        self.scan_settings.epoll_operations = self.operations_of(epoll.as_fd())?;
        Ok(())
    }

    /// Learns the `file_operations` of sockets by creating one.
    fn learn_sockets(&mut self) -> Result<()> {
        let socket = UnixDatagram::unbound().context("cannot create a socket to probe")?;
        self.scan_settings.socket_operations = self.operations_of(socket.as_fd())?;
        Ok(())
    }

    /// The address of the `file_operations` of one of the agent's own files.
    fn operations_of(&mut self, file: BorrowedFd<'_>) -> Result<u64> {
        if !self.capabilities.fields.has(Feature::Rings) {
            bail!("BTF does not describe the operations of a file");
        }
        self.learn_own_tgid()?;
        let operations = link(&self.ebpf, "file_operations", IterScope::All)?;
        let wanted = file.as_raw_fd() as u32;
        let mut found = 0;
        run(&operations, &mut self.buffer, &mut |record| {
            if let Record::Operations(file) = record
                && file.fd == wanted
            {
                found = file.operations;
            }
        })?;
        if found == 0 {
            bail!("the scan did not find the agent's own file");
        }
        Ok(found)
    }

    /// Writes the scan settings with the agent's own tgid in the initial pid namespace.
    pub(super) fn learn_own_tgid(&mut self) -> Result<()> {
        let own_pid = std::process::id();
        let mut own_tgid = 0;
        self.scan_processes(&mut |record| {
            if let Record::Process(process) = record
                && process.pid == own_pid
            {
                own_tgid = process.header.tgid;
            }
        })?;
        self.scan_settings.own_tgid = own_tgid;
        self.write_scan_settings()
    }
}

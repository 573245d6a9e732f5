//! From a container's specification and its image to what is executed: arguments, environment, user.
//! Pure: files of the image come in as text.

use super::image::ImageConfig;
use super::spec::ContainerSpec;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Program and arguments: `command` replaces the entrypoint and drops the image's arguments, `args`
/// replaces those only.
pub(super) fn arguments(spec: &ContainerSpec) -> Vec<String> {
    let ImageConfig { entrypoint, cmd, .. } = &spec.image.config;
    let (head, tail) = match (spec.command.is_empty(), spec.args.is_empty()) {
        (true, true) => (entrypoint, cmd),
        (true, false) => (entrypoint, &spec.args),
        (false, _) => (&spec.command, &spec.args),
    };
    head.iter().chain(tail).cloned().collect()
}

/// The image's variables, then the container's over them, then `HOSTNAME`, `HOME` and `PATH` where
/// nobody set them.
pub(super) fn environment(spec: &ContainerSpec, hostname: &str, home: &str) -> Vec<(String, String)> {
    let mut out: Vec<(String, String)> = Vec::new();
    for (name, value) in spec.image.config.env.iter().chain(&spec.env) {
        match out.iter_mut().find(|(n, _)| n == name) {
            Some((_, old)) => old.clone_from(value),
            None => out.push((name.clone(), value.clone())),
        }
    }
    for (name, value) in [("PATH", DEFAULT_PATH), ("HOSTNAME", hostname), ("HOME", home)] {
        if !value.is_empty() && !out.iter().any(|(n, _)| n == name) {
            out.push((name.to_owned(), value.to_owned()));
        }
    }
    out
}

/// Directory that the program starts in.
pub(super) fn working_dir(spec: &ContainerSpec) -> &str {
    let image = spec.image.config.working_dir.as_str();
    let chosen = if spec.working_dir.is_empty() { image } else { spec.working_dir.as_str() };
    if chosen.is_empty() { "/" } else { chosen }
}

/// Who a container runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Account { name, uid, gid, home: fields.nth(1).unwrap_or("/") })
    })
}

/// `(name, gid, members)` of each group.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        Some((name, fields.nth(1)?.parse().ok()?, fields.next().unwrap_or("")))
    })
}

/// Finds out who runs. `passwd` and `group` are the image's files, empty where it has none.
pub(super) fn identity(spec: &ContainerSpec, passwd: &str, group: &str) -> Result<Identity, String> {
    let image_user = spec.image.config.user.as_str();
    let (user, image_group) = match image_user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (image_user, None),
    };
    let numeric = if user.is_empty() { Some(0) } else { user.parse::<u32>().ok() };
    let account = match (spec.run_as_user, numeric) {
        (Some(uid), _) | (None, Some(uid)) => accounts(passwd).find(|a| a.uid == uid),
        (None, None) => {
            let found = accounts(passwd).find(|a| a.name == user);
            Some(found.ok_or_else(|| format!("user {user}: not in the image's /etc/passwd"))?)
        }
    };
    let uid = spec.run_as_user.or(account.as_ref().map(|a| a.uid)).or(numeric).unwrap_or(0);
    let primary = account.as_ref().map_or(0, |a| a.gid);
    let gid = match (spec.run_as_group, spec.run_as_user, image_group) {
        (Some(gid), _, _) => gid,
        (None, None, Some(name)) => match name.parse() {
            Ok(gid) => gid,
            Err(_) => {
                let found = groups(group).find(|(n, _, _)| *n == name);
                found.ok_or_else(|| format!("group {name}: not in the image's /etc/group"))?.1
            }
        },
        _ => primary,
    };
    if spec.run_as_non_root && uid == 0 {
        return Err("runAsNonRoot is set and the container would run as user 0".to_owned());
    }
    let mut all = vec![gid];
    if let Some(account) = &account {
        let of_user = groups(group).filter(|(_, _, members)| members.split(',').any(|m| m == account.name));
        all.extend(of_user.map(|(_, gid, _)| gid));
    }
    all.extend(&spec.supplemental_groups);
    all.sort_unstable();
    all.dedup();
    let home = account.map_or("/", |a| if a.home.is_empty() { "/" } else { a.home }).to_owned();
    Ok(Identity { uid, gid, groups: all, home })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:Web:/var/www:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\nlogs:x:50:web,other\ndisk:x:6:root\n";

    fn spec() -> ContainerSpec {
        let mut spec = ContainerSpec::default();
        spec.image.config.entrypoint = vec!["/e".into(), "-x".into()];
        spec.image.config.cmd = vec!["c".into()];
        spec
    }

    fn as_user(user: &str) -> ContainerSpec {
        let mut spec = spec();
        spec.image.config.user = user.to_owned();
        spec
    }

    #[test]
    fn arguments_follow_kubernetes_table() {
        let mut s = spec();
        assert_eq!(arguments(&s), ["/e", "-x", "c"]);
        s.args = vec!["a".into()];
        assert_eq!(arguments(&s), ["/e", "-x", "a"]);
        s.command = vec!["/k".into()];
        assert_eq!(arguments(&s), ["/k", "a"]);
        s.args.clear();
        assert_eq!(arguments(&s), ["/k"]);
    }

    #[test]
    fn later_variables_replace_earlier_ones_in_place() {
        let mut s = spec();
        s.image.config.env = vec![("A".into(), "1".into()), ("PATH".into(), "/p".into())];
        s.env = vec![("B".into(), "2".into()), ("A".into(), "3".into())];
        let env = environment(&s, "host", "/root");
        let flat: Vec<_> = env.iter().map(|(n, v)| format!("{n}={v}")).collect();
        assert_eq!(flat, ["A=3", "PATH=/p", "B=2", "HOSTNAME=host", "HOME=/root"]);
    }

    #[test]
    fn nobody_asked_means_root_with_its_groups() {
        let who = identity(&spec(), PASSWD, GROUP).unwrap();
        assert_eq!(who, Identity { uid: 0, gid: 0, groups: vec![0, 6], home: "/root".into() });
        let bare = identity(&spec(), "", "").unwrap();
        assert_eq!((bare.uid, bare.gid, bare.groups), (0, 0, vec![0]));
    }

    #[test]
    fn names_are_looked_up_and_numbers_need_no_account() {
        let web = identity(&as_user("web"), PASSWD, GROUP).unwrap();
        assert_eq!((web.uid, web.gid, web.groups), (33, 34, vec![34, 50]));
        let group = identity(&as_user("web:logs"), PASSWD, GROUP).unwrap();
        assert_eq!(group.gid, 50);
        let number = identity(&as_user("1000:7"), PASSWD, GROUP).unwrap();
        assert_eq!((number.uid, number.gid, number.groups), (1000, 7, vec![7]));
        assert!(identity(&as_user("nobody"), PASSWD, GROUP).unwrap_err().contains("nobody"));
        assert!(identity(&as_user("web:gone"), PASSWD, GROUP).unwrap_err().contains("gone"));
    }

    #[test]
    fn the_pod_overrides_the_image() {
        let mut s = as_user("web:logs");
        s.run_as_user = Some(1000);
        s.supplemental_groups = vec![9, 9];
        let who = identity(&s, PASSWD, GROUP).unwrap();
        assert_eq!((who.uid, who.gid, who.groups), (1000, 0, vec![0, 9]));
        s.run_as_group = Some(5);
        assert_eq!(identity(&s, PASSWD, GROUP).unwrap().gid, 5);
    }

    #[test]
    fn non_root_is_checked_after_everything_is_known() {
        let mut s = as_user("root");
        s.run_as_non_root = true;
        assert!(identity(&s, PASSWD, GROUP).is_err());
        s.run_as_user = Some(1);
        assert!(identity(&s, PASSWD, GROUP).is_ok());
    }
}

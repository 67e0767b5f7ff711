//! What a check found: a line for each answer, and under it what to do.

use std::fmt::Write as _;

use engine::check::{Area, Finding, Report, Verdict};

use super::failure::redact;
use super::on_one_line;
use crate::units::count;

/// The report without the passwords of conninfo strings that an answer may quote.
pub fn without_secrets(mut done: Report) -> Report {
    for finding in &mut done.checks {
        finding.message = redact(&finding.message);
        finding.hint = finding.hint.as_deref().map(redact);
    }
    done
}

/// The answers by what they are about, and at last what they come to.
pub fn check(done: &Report) -> String {
    let mut text = String::new();
    let mut area = None;
    for finding in &done.checks {
        if area.replace(finding.area) != Some(finding.area) {
            let _ = writeln!(text, "{}", heading(finding.area));
        }
        text += &answer(finding);
    }
    text + &conclusion(done)
}

fn heading(area: Area) -> &'static str {
    match area {
        Area::Repository => "repository",
        Area::Server => "server",
        Area::Next => "next backup",
    }
}

fn answer(finding: &Finding) -> String {
    let mut text = format!("  {:<7}  {}\n", finding.status.word(), on_one_line(&finding.message));
    for hint in finding.hint.iter().flat_map(|hint| hint.lines()) {
        let _ = writeln!(text, "           hint: {}", on_one_line(hint));
    }
    text
}

fn conclusion(done: &Report) -> String {
    let of = |wanted: &str| done.checks.iter().filter(|finding| finding.status.word() == wanted).count() as u64;
    let is_tight = done.checks.iter().any(|finding| finding.check == "space" && finding.status == Verdict::Warning);
    let conclusion = match done.status {
        Verdict::Ok | Verdict::Warning if is_tight => "a backup would work, if it fits",
        Verdict::Ok | Verdict::Warning => "a backup would work",
        Verdict::Damage => "a backup would work, but THE REPOSITORY IS DAMAGED",
        Verdict::Failed => "A BACKUP WOULD FAIL",
        Verdict::Unreadable => "THE REPOSITORY CANNOT BE USED",
    };
    let warnings = count(of("warning"), "warning");
    format!("{conclusion}: {} ok, {warnings}, {} failed\n", of("ok"), of("failed"))
}

#[cfg(test)]
mod tests {
    use engine::check::Facts;
    use serde_json::{Value, json};

    use super::super::tests::lines;
    use super::super::to_json;
    use super::*;

    fn report() -> Report {
        let finding = |area, check, status, message: &str, hint: Option<&str>| Finding {
            area,
            check,
            status,
            message: message.to_owned(),
            hint: hint.map(str::to_owned),
        };
        Report {
            status: Verdict::Failed,
            backup_possible: false,
            checks: vec![
                finding(Area::Repository, "writable", Verdict::Ok, "it can be written to", None),
                finding(Area::Repository, "space", Verdict::Warning, "1.00 GiB free", Some("make room")),
                finding(
                    Area::Server,
                    "connection",
                    Verdict::Failed,
                    "nobody\u{1b}[2J\nis there",
                    Some("start it\nlook"),
                ),
            ],
            facts: Facts { free_bytes: Some(1 << 30), ..Facts::default() },
            seconds: 0.25,
        }
    }

    #[test]
    fn each_answer_is_a_line_with_what_to_do_below() {
        assert_eq!(
            lines(&check(&report())),
            [
                "repository",
                "  ok       it can be written to",
                "  warning  1.00 GiB free",
                "           hint: make room",
                "server",
                r"  failed   nobody\u{1b}[2J\nis there",
                "           hint: start it",
                "           hint: look",
                "A BACKUP WOULD FAIL: 1 ok, 1 warning, 1 failed",
            ]
        );
    }

    #[test]
    fn where_there_is_little_room_the_verdict_says_so() {
        let mut told = report();
        told.checks.pop();
        told.status = Verdict::Warning;
        assert!(check(&told).ends_with("\na backup would work, if it fits: 1 ok, 1 warning, 0 failed\n"));
        told.checks.pop();
        assert!(check(&told).ends_with("\na backup would work: 1 ok, 0 warnings, 0 failed\n"));
    }

    #[test]
    fn passwords_never_reach_an_answer() {
        let mut told = report();
        told.checks[2].message = "cannot connect to postgresql://me:s3cret@host/db".to_owned();
        told.checks[2].hint = Some("not password=s3cret".to_owned());
        let told = check(&without_secrets(told));
        assert!(told.contains("me:***@host") && !told.contains("s3cret"), "{told}");
    }

    #[test]
    fn programs_get_the_answers_and_the_numbers() {
        let document: Value = serde_json::from_str(&to_json(&report()).unwrap()).unwrap();
        assert_eq!((&document["status"], &document["backup_possible"]), (&json!("failed"), &json!(false)));
        let space = json!({
            "area": "repository", "check": "space", "status": "warning", "message": "1.00 GiB free", "hint": "make room"
        });
        assert_eq!(document["checks"][1], space);
        assert_eq!((&document["free_bytes"], &document["cluster_bytes"]), (&json!(1 << 30), &Value::Null));
    }
}

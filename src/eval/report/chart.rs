//! Line charts as SVG.

use std::path::Path;

use plotters::prelude::*;

/// One line.
pub(super) struct Line {
    pub(super) label: String,
    /// `(x, y)`, by x.
    pub(super) points: Vec<(f64, f64)>,
}

/// Width and height.
const SIZE_PIXELS: (u32, u32) = (720, 420);

/// Colours that are told apart without red against green (Okabe and Ito 2008).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(90, 90, 90),
];

/// Draws lines over a logarithmic count of tokens. `y` is the range of the other axis.
///
/// # Errors
/// What drawing or writing the file reports, for people.
pub(super) fn line_chart(
    path: &Path,
    title: &str,
    y_title: &str,
    y: std::ops::Range<f64>,
    lines: &[Line],
) -> Result<(), String> {
    draw(path, title, y_title, y, lines).map_err(|error| error.to_string())
}

fn draw(
    path: &Path,
    title: &str,
    y_title: &str,
    y: std::ops::Range<f64>,
    lines: &[Line],
) -> Result<(), Box<dyn std::error::Error>> {
    let xs = || lines.iter().flat_map(|line| line.points.iter().map(|point| point.0));
    let (first, last) = (xs().fold(f64::INFINITY, f64::min), xs().fold(1.0, f64::max));
    let root = SVGBackend::new(path, SIZE_PIXELS).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d((first.min(last) * 0.9..last * 1.1).log_scale(), y)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("tokens")
        .y_desc(y_title)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .draw()?;
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), colour.stroke_width(2)).point_size(3))?
            .label(&line.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
    root.present()?;
    Ok(())
}

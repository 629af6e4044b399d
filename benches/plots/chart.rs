//! A drawing: two panels over the same places, rates above and times below.

use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::combinators::BindKeyPoints;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use crate::common::AnyError;

const SIZE: (u32, u32) = (900, 720);
const FONT: &str = "sans-serif";
/// From one place to the next, in the whole numbers of that axis.
const STEP: i32 = 30;
/// Told apart by those who see no difference of red and green, too.
const COLORS: [RGBColor; 3] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
];

pub(crate) struct Chart {
    pub(crate) title: String,
    /// In small type: where it was measured.
    pub(crate) note: String,
    /// What the places are, and what each of them is called.
    pub(crate) places: (String, Vec<String>),
    pub(crate) rates: Vec<Line>,
    /// In milliseconds.
    pub(crate) times: Vec<Line>,
}

/// A value for each place.
pub(crate) struct Line {
    pub(crate) name: &'static str,
    pub(crate) values: Vec<f64>,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

impl Chart {
    pub(crate) fn draw(&self, path: &Path) -> Result<(), AnyError> {
        let area = SVGBackend::new(path, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let area = area.titled(&self.title, (FONT, 21))?;
        let area = area.titled(&self.note, (FONT, 13))?;
        let (above, below) = area.split_vertically((area.dim_in_pixel().1 / 2) as i32);
        let rates = 0.0..most(&self.rates) * 1.1;
        self.panel(
            &above,
            "requests a second",
            &self.rates,
            rates,
            SeriesLabelPosition::LowerRight,
        )?;
        let (from, to) = (least(&self.times), most(&self.times));
        // With room above them for their names.
        let (from, to) = (from / 1.5, to * (to / from).sqrt().max(3.0));
        let decades = from.log10().floor() as i32..=to.log10().floor() as i32;
        let marks =
            decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|mark| mark * 10_f64.powi(decade)));
        let marks: Vec<f64> = marks.filter(|mark| (from..to).contains(mark)).collect();
        self.panel(
            &below,
            "milliseconds",
            &self.times,
            (from..to).log_scale().with_key_points(marks),
            SeriesLabelPosition::UpperLeft,
        )?;
        area.present()?;
        Ok(())
    }

    fn panel<Y>(
        &self,
        area: &Area<'_>,
        unit: &str,
        lines: &[Line],
        values: Y,
        names_at: SeriesLabelPosition,
    ) -> Result<(), AnyError>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let (what, names) = &self.places;
        let places: Vec<i32> = (0..names.len() as i32).map(|place| place * STEP).collect();
        let range = -STEP / 3..places.last().copied().unwrap_or_default() + STEP / 3;
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(72)
            .build_cartesian_2d(range.with_key_points(places), values)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(BLACK.mix(0.15))
            .x_label_formatter(&|place| names[(place / STEP) as usize].clone())
            .y_label_formatter(&|value| figure(*value))
            .x_desc(what)
            .y_desc(unit)
            .label_style((FONT, 13))
            .axis_desc_style((FONT, 14))
            .draw()?;
        for (line, color) in lines.iter().zip(COLORS) {
            let points = || {
                (0..)
                    .step_by(STEP as usize)
                    .zip(line.values.iter().copied())
            };
            chart
                .draw_series(LineSeries::new(points(), color.stroke_width(2)))?
                .label(line.name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2))
                });
            chart.draw_series(points().map(|point| Circle::new(point, 3, color.filled())))?;
        }
        chart
            .configure_series_labels()
            .position(names_at)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.2))
            .label_font((FONT, 13))
            .draw()?;
        Ok(())
    }
}

/// 12000 as 12,000, and 0.5 as it is.
fn figure(value: f64) -> String {
    if value < 1000.0 {
        return format!("{value}");
    }
    let whole = value as u64;
    format!("{},{:03}", whole / 1000, whole % 1000)
}

fn values(lines: &[Line]) -> impl Iterator<Item = f64> {
    lines.iter().flat_map(|line| line.values.iter().copied())
}

fn most(lines: &[Line]) -> f64 {
    values(lines).fold(f64::MIN_POSITIVE, f64::max)
}

fn least(lines: &[Line]) -> f64 {
    values(lines).fold(f64::MAX, f64::min)
}
